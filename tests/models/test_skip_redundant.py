"""What `model.skip_redundant` leaves out changes neither outputs nor gradients: compared in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.layers.attention import AttentionChoice, set_attention_
from cmae_scale.layers.blocks import build_blocks
from cmae_scale.layers.tokens import pack_tokens, patchify, take_tokens, unpack_tokens
from cmae_scale.losses import infonce, pixel_loss
from cmae_scale.models import CMAE, build_cmae

EXACT = {"rtol": 1e-12, "atol": 1e-12}
IMAGES, PATCH = 3, 4
CONV = {"dims": (8, 12), "depths": (1, 1), "mlp_ratio": 2.0}


def read(*, skip: bool, side: int = 24, pixel_depth: int = 2, **changes: Any) -> CmaeConfig:
    model = {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "patch_size": PATCH,
        "pixel_decoder": {"depth": pixel_depth, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 2.0},
        "feature_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 2, **changes.pop("feature", {})},
        "skip_redundant": skip,
        **changes.pop("model", {}),
    }
    views = {"img_px": side, "master_px": side, "shift_px": 1}
    heads = {"hidden_dim": 20, "out_dim": 12}
    run = {"model": model, "views": views, "heads": heads, "data": {"shards": "x"}, **changes}
    return CmaeConfig.model_validate(run)


def shaken(cfg: CmaeConfig) -> CMAE:
    """In fp64, every parameter off its starting value, so that no bias is zero and no norm the identity."""
    model, rng = build_cmae(cfg).double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.1)
    return model


def results(model: CMAE, cfg: CmaeConfig) -> dict[str, Tensor]:
    """Outputs and the gradient of every parameter."""
    rng, side = torch.Generator().manual_seed(1), cfg.views.img_px
    online, target = torch.randn(2, IMAGES, 3, side, side, generator=rng, dtype=torch.float64)
    noise = torch.rand(IMAGES, (side // PATCH // cfg.mask.cell) ** 2, generator=rng)
    output = model(online, target if cfg.has_contrast else None, noise=noise, target_noise=noise)
    loss = pixel_loss(output.pixels, take_tokens(patchify(online, PATCH), output.mask.hidden))
    if cfg.has_contrast:
        loss = loss + infonce(output.query, output.key, first_row=0, temperature=0.07)
    model.zero_grad()
    loss.backward()
    found = {f"grad of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    given = {name: value for name, value in output._asdict().items() if isinstance(value, Tensor)}
    return {**given, **found}


def assert_equal(prepare: Callable[[CMAE], object] = lambda model: None, **changes: Any) -> None:
    models = []
    for skip in (False, True):
        cfg = read(skip=skip, **changes)
        model = shaken(cfg)
        prepare(model)
        models.append((model, cfg))
    (whole, _), (short, _) = models
    assert list(whole.state_dict()) == list(short.state_dict())
    expected, got = (results(*one) for one in models)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mask", [{"ratio": 0.65, "cell": 2}, {"ratio": 0.75, "cell": 1}, {"ratio": 0.1}])
@pytest.mark.parametrize("model", [{}, {"conv": CONV}], ids=["plain", "hybrid"])
@pytest.mark.parametrize(
    ("pixel_depth", "feature"),
    [(1, {}), (3, {}), (2, {"shared": True}), (3, {"shared": True}), (2, {"depth": 0}), (2, {"depth": 1})],
)
def test_decoders_give_the_same(
    pixel_depth: int, feature: dict[str, Any], model: dict[str, Any], mask: dict[str, Any]
) -> None:
    assert_equal(pixel_depth=pixel_depth, feature=feature, model=model, mask=mask)


@pytest.mark.parametrize("model", [{}, {"conv": CONV}, {"depth": 1}], ids=["plain", "hybrid", "one block"])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("final_norm", [False, True])
def test_targets_give_the_same(final_norm: bool, ratio: float, model: dict[str, Any]) -> None:
    assert_equal(target={"final_norm": final_norm, "mask_ratio": ratio}, model=model)


@pytest.mark.parametrize(
    "changes", [{"target": {"pool": "cls"}}, {"loss": {"weight": 0.0}}, {"side": 48}], ids=str
)
def test_so_does_every_variant(changes: dict[str, Any]) -> None:
    assert_equal(**changes)


@pytest.mark.parametrize("name", ["explicit", "flash", "math"])
def test_so_does_every_attention(name: str) -> None:
    assert_equal(lambda model: set_attention_(model, AttentionChoice(name, is_forced=False)))


def test_so_do_recomputed_blocks() -> None:
    assert_equal(lambda model: model.set_remat_(lambda block, x: checkpoint(block, x, use_reentrant=False)))


@given(
    images=st.integers(1, 4),
    tokens=st.integers(2, 9),
    visible=st.integers(1, 8),
    queries=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_block_on_a_part_is_that_part_of_the_block(
    images: int, tokens: int, visible: int, queries: int, seed: int
) -> None:
    rng, visible, queries = torch.Generator().manual_seed(seed), min(visible, tokens), min(queries, tokens)
    [block] = build_blocks(1, embed_dim=8, num_heads=2, mlp_ratio=1.5).double()
    own = torch.randn(images, visible, 8, generator=rng, dtype=torch.float64)
    blanks = torch.randn(tokens, 8, generator=rng, dtype=torch.float64)
    places, asked = (
        torch.rand(images, tokens, generator=rng).argsort(dim=1)[:, :count] for count in (visible, queries)
    )
    rows = pack_tokens(own, blanks)
    whole = torch.stack([blanks.index_copy(0, at, mine) for at, mine in zip(places, own, strict=True)])
    assert torch.equal(unpack_tokens(rows, places), whole)
    expected = block(whole)
    torch.testing.assert_close(block(rows, places=places), expected, **EXACT)
    torch.testing.assert_close(block(whole, queries=asked), take_tokens(expected, asked), **EXACT)
    torch.testing.assert_close(
        block(rows, places=places, queries=asked), take_tokens(expected, asked), **EXACT
    )
    for first in (0, 1):
        torch.testing.assert_close(block(whole, mean_from=first), expected[:, first:].mean(dim=1), **EXACT)


def test_every_layer_runs_through_its_own_call() -> None:
    """ZeRO-3 has a layer's weights whole only while its call or its block's lasts."""
    [block] = build_blocks(1, embed_dim=8, num_heads=2, mlp_ratio=2.0)
    inside: list[str] = []
    for name, module in block.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: inside.append(name))
    tokens, index = torch.randn(2, 5, 8), torch.tensor([[0, 3], [1, 2]])
    for options in ({"queries": index}, {"mean_from": 1}):
        inside.clear()
        block(tokens, **options)
        assert sorted(inside) == ["attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
