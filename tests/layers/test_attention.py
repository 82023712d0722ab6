import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from torch.utils.checkpoint import checkpoint

from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.attention import AttentionChoice, choose_attention, set_attention_, use_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_on_the_cpu_takes_explicit_products(dtype: torch.dtype) -> None:
    choice = choose_attention("auto", device=CPU, dtype=dtype, head_dim=32, tokens=197)
    assert choice == AttentionChoice("explicit", is_forced=False)
    assert not choice.is_fused


def test_full_precision_on_the_cpu_tells_what_torch_picks() -> None:
    choice = choose_attention("auto", device=CPU, dtype=torch.float32, head_dim=32, tokens=197)
    assert choice.name in {"flash", "math"}
    assert choice.is_fused
    assert not choice.is_forced


def test_a_named_kernel_that_can_run_is_forced() -> None:
    choice = choose_attention("math", device=CPU, dtype=torch.float32, head_dim=32, tokens=50)
    assert choice == AttentionChoice("math", is_forced=True)


def test_a_named_kernel_that_cannot_run_is_an_error_that_names_those_that_can() -> None:
    with pytest.raises(ConfigError, match=r'"cudnn" cannot run heads of 32 in float32 on cpu: .*"math"'):
        choose_attention("cudnn", device=CPU, dtype=torch.float32, head_dim=32, tokens=50)


def test_probing_leaves_torch_as_it_was() -> None:
    query = torch.zeros(1, 2, 50, 32)
    before = torch._fused_sdp_choice(query, query, query)
    with pytest.raises(ConfigError):
        choose_attention("efficient", device=CPU, dtype=torch.float32, head_dim=32, tokens=50)
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

    def attend(query: torch.Tensor) -> torch.Tensor:
        kernels.append(torch._fused_sdp_choice(query, query, query))
        return F.scaled_dot_product_attention(query, query, query)

    with use_attention(AttentionChoice("math", is_forced=True)):
        output = checkpoint(attend, query, use_reentrant=False)
        assert isinstance(output, torch.Tensor)
        output.sum().backward()
    assert kernels == [0, 0]


def test_explicit_and_fused_attention_agree(rng: torch.Generator) -> None:
    attention = TimmAttention(32, num_heads=4, qkv_bias=True)
    tokens = torch.randn(2, 9, 32, generator=rng)
    outputs = []
    for choice in (AttentionChoice("explicit", is_forced=False), AttentionChoice("flash", is_forced=False)):
        set_attention_(attention, choice)
        assert attention.fused_attn is choice.is_fused
        outputs.append(attention(tokens))
    torch.testing.assert_close(*outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 69), (64, 197), (32, 197)])
def test_a_gpu_has_a_memory_saving_kernel_for_the_shapes_of_cmae(head_dim: int, tokens: int) -> None:
    choice = choose_attention(
        "auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=head_dim, tokens=tokens
    )
    assert choice.name in {"flash", "efficient", "cudnn"}
