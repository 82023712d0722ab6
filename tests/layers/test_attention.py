from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from torch.utils.checkpoint import checkpoint

from cmae_scale.core.errors import ConfigError
from cmae_scale.layers import attention
from cmae_scale.layers.attention import (
    Arithmetic,
    AttentionChoice,
    AttentionShape,
    choose_attention,
    describe_attention,
    set_attention_,
    use_attention,
)

CPU = Arithmetic(torch.device("cpu"), torch.float32)
SHAPE = AttentionShape(heads=2, head_dim=32, tokens=50)


@pytest.fixture
def fused_takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`fused_takes(3.0)`: torch's kernel takes 3 times as long as explicit products."""

    def pretend(times: float) -> None:
        monkeypatch.setattr(attention, "time_in_turns", lambda ways: [times, 1.0])

    return pretend


@pytest.mark.parametrize(
    ("times", "is_fused"), [(0.1, True), (1.0, True), (1.1, True), (1.3, False), (9, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_takes_explicit_products_where_they_are_clearly_faster(
    fused_takes: Callable[[float], None], dtype: torch.dtype, times: float, is_fused: bool
) -> None:
    fused_takes(times)
    choice = choose_attention("auto", SHAPE, CPU._replace(dtype=dtype))
    assert choice.is_fused is is_fused
    assert not choice.is_forced
    assert choice.name in ({"flash", "math"} if is_fused else {"explicit"})


@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize(("dtype", "is_autocast"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("shape", [AttentionShape(2, 8, 5), AttentionShape(3, 16, 17, images=2)])
def test_a_trial_leaves_no_trace(
    shape: AttentionShape, dtype: torch.dtype, is_autocast: bool, is_trained: bool
) -> None:
    query, before = torch.zeros(1, 2, 50, 32), torch.get_rng_state()
    picked = torch._fused_sdp_choice(query, query, query)
    with torch.no_grad():
        choose_attention(
            "auto", shape._replace(is_trained=is_trained), Arithmetic(torch.device("cpu"), dtype, is_autocast)
        )
        assert not torch.is_grad_enabled()
    assert torch._fused_sdp_choice(query, query, query) == picked
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.is_autocast_enabled("cpu")


def test_a_trial_computes_what_timm_computes(rng: torch.Generator) -> None:
    module = TimmAttention(32, num_heads=4)
    module.fused_attn = False
    tokens = torch.randn(2, 9, 32, generator=rng)
    query, key, value = module.qkv(tokens).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
    attended = attention.attend_explicitly(query, key, value).transpose(1, 2).flatten(2)
    assert torch.equal(module.proj(attended), module(tokens))


def test_explicit_products_can_be_named() -> None:
    assert choose_attention("explicit", SHAPE, CPU) == AttentionChoice("explicit", is_forced=False)


def test_a_named_kernel_that_can_run_is_forced() -> None:
    assert choose_attention("math", SHAPE, CPU) == AttentionChoice("math", is_forced=True)


def test_a_named_kernel_that_cannot_run_is_an_error_that_names_those_that_can() -> None:
    with pytest.raises(ConfigError) as error:
        choose_attention("cudnn", SHAPE, CPU, section="transfer.encoder")
    told = 'transfer.encoder.attention "cudnn" cannot run 50 tokens in heads of 32 in float32 on cpu'
    assert str(error.value) == f'{told}: write "auto", or one of "flash", "math", "explicit"'


def test_probing_leaves_torch_as_it_was() -> None:
    query = torch.zeros(1, 2, 50, 32)
    before = torch._fused_sdp_choice(query, query, query)
    with pytest.raises(ConfigError):
        choose_attention("efficient", SHAPE, CPU)
    assert torch._fused_sdp_choice(query, query, query) == before


def test_a_forced_choice_holds_inside_the_context_alone() -> None:
    query = torch.zeros(1, 2, 50, 32)
    free = torch._fused_sdp_choice(query, query, query)
    with use_attention(AttentionChoice("math", is_forced=True)):
        assert torch._fused_sdp_choice(query, query, query) == 0
    assert torch._fused_sdp_choice(query, query, query) == free


def test_a_forced_choice_holds_when_backward_recomputes() -> None:
    query = torch.randn(1, 2, 5, 4, requires_grad=True)
    kernels = []

    def run_context(query: torch.Tensor) -> torch.Tensor:
        kernels.append(torch._fused_sdp_choice(query, query, query))
        return F.scaled_dot_product_attention(query, query, query)

    with use_attention(AttentionChoice("math", is_forced=True)):
        output = checkpoint(run_context, query, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
    assert kernels == [0, 0]


def test_explicit_and_fused_attention_agree(rng: torch.Generator) -> None:
    module = TimmAttention(32, num_heads=4, qkv_bias=True)
    tokens = torch.randn(2, 9, 32, generator=rng)
    outputs = []
    for choice in (AttentionChoice("explicit", is_forced=False), AttentionChoice("flash", is_forced=False)):
        set_attention_(module, choice)
        assert module.fused_attn is choice.is_fused
        outputs.append(module(tokens))
    torch.testing.assert_close(*outputs)


def test_parts_are_told_apart_where_they_differ() -> None:
    flash, explicit = (AttentionChoice(name, is_forced=False) for name in ("flash", "explicit"))
    assert describe_attention({"online_encoder": flash, "pixel_decoder": flash}) == "flash"
    parts = {"online_encoder": explicit, "target_encoder": flash, "pixel_decoder": explicit}
    told = describe_attention(parts)
    assert told == "explicit in online encoder and pixel decoder, flash in target encoder"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 69), (64, 197), (32, 197)])
def test_a_gpu_has_a_memory_saving_kernel_for_the_shapes_of_cmae(head_dim: int, tokens: int) -> None:
    shape, gpu = AttentionShape(2, head_dim, tokens), torch.device("cuda")
    choice = choose_attention("auto", shape, Arithmetic(gpu, torch.bfloat16, is_autocast=True))
    assert choice.name in {"flash", "efficient", "cudnn"}
