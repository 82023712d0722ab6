"""Bytes that a forward pass leaves for backward: the closed form beside the storages that are alive."""

from typing import Any, get_args

import pytest
import torch

from cmae_scale.config.cmae import CmaeConfig, Remat
from cmae_scale.config.precision import NumberFormats
from cmae_scale.engine.pretraining import _hidden_patches
from cmae_scale.engine.zero.remat import choose_block_runner
from cmae_scale.layers.attention import AttentionChoice, set_attention_, use_attention
from cmae_scale.losses import infonce, pixel_loss
from cmae_scale.models import build_cmae
from cmae_scale.sizing.activations import Kernel, Method, count_activations, plan_encoder

FORMATS = {
    "fp32": NumberFormats("float32", "float32"),
    "autocast": NumberFormats("bfloat16", "float32"),
    "bf16": NumberFormats("bfloat16", "bfloat16"),
}
ATTENTION = {
    "fused": AttentionChoice("flash", is_forced=True),
    "explicit": AttentionChoice("explicit", is_forced=False),
    "math": AttentionChoice("math", is_forced=True),
}
SMALL: dict[str, Any] = {
    "model": {
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "patch_size": 8,
        "pixel_decoder": {"depth": 2, "embed_dim": 32, "num_heads": 4},
        "feature_decoder": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    },
    "views": {"img_px": 48, "master_px": 48, "shift_px": 1},
    "mask": {"ratio": 0.65, "cell": 1},
    "heads": {"hidden_dim": 40, "out_dim": 16},
    "data": {"shards": "x"},
}
HYBRID: dict[str, Any] = {
    **SMALL["model"],
    "conv": {"dims": (20, 28), "depths": (1, 2), "mlp_ratio": 2.5},
}


def alive_after_forward(
    live: Any, cfg: CmaeConfig, images: int, *, formats: NumberFormats, kernel: Kernel
) -> int:
    """Bytes of storages that forward and losses make and leave, weights' copies included."""
    model = build_cmae(cfg)
    if not formats.is_autocast and formats.compute_bytes == 2:
        model.bfloat16()
    set_attention_(model, ATTENTION[kernel])
    model.set_remat_(choose_block_runner(cfg.model.remat, settings={}))
    side, cells = cfg.views.img_px, (cfg.views.img_px // cfg.model.patch_size // cfg.mask.cell) ** 2
    online, target = torch.randn(2, images, 3, side, side)
    noise = torch.rand(images, cells)
    with live, use_attention(ATTENTION[kernel]):
        live.watch([online, target, noise, *model.parameters(), *model.buffers()])
        before = live.now
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=formats.is_autocast):
            output = model(online, target if cfg.has_contrast else None, noise=noise, target_noise=noise)
        pixel = pixel_loss(output.pixels, _hidden_patches(online, output.mask, cfg))
        loss = pixel
        if cfg.has_contrast:
            loss = pixel + infonce(output.query, output.key, first_row=0, temperature=0.07)
        alive = live.now - before
        loss.backward()  # a recomputation must find the same attention
    return alive


def measure(live: Any, cfg: CmaeConfig, *, formats: NumberFormats, kernel: Kernel) -> float:
    """Bytes that one more image adds; what does not depend on images cancels."""
    few, many = (alive_after_forward(live, cfg, count, formats=formats, kernel=kernel) for count in (4, 12))
    return (many - few) / 8


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("formats", FORMATS)
def test_what_is_kept_is_what_is_alive(live_bytes: Any, formats: str, kernel: Kernel, remat: Remat) -> None:
    cfg = CmaeConfig.model_validate({**SMALL, "model": {**SMALL["model"], "remat": remat}})
    predicted = sum(count_activations(cfg, method=Method(FORMATS[formats], kernel, remat)))
    assert measure(live_bytes, cfg, formats=FORMATS[formats], kernel=kernel) == pytest.approx(
        predicted, rel=0.02
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"weight": 0.0}},
        {"model": {**SMALL["model"], "feature_decoder": {"depth": 0}}},
        {"model": {**SMALL["model"], "feature_decoder": {"depth": 1, "embed_dim": 32, "shared": True}}},
        {"heads": {"hidden_dim": 40, "out_dim": 16, "norm": "layer"}},
        {"mask": {"ratio": 0.5, "cell": 2}, "target": {"mask_ratio": 0.5, "final_norm": True}},
        {"model": {**SMALL["model"], "patch_size": 16, "mlp_ratio": 2.5}},
    ],
    ids=["mae", "no feature decoder", "shared", "layer norm", "cells", "other sizes"],
)
@pytest.mark.parametrize("formats", FORMATS)
def test_so_it_is_for_other_models(live_bytes: Any, changes: dict[str, Any], formats: str) -> None:
    cfg = CmaeConfig.model_validate({**SMALL, **changes})
    predicted = sum(count_activations(cfg, method=Method(FORMATS[formats], "explicit", "none")))
    assert measure(live_bytes, cfg, formats=FORMATS[formats], kernel="explicit") == pytest.approx(
        predicted, rel=0.02
    )


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize("formats", FORMATS)
def test_with_skip_redundant_no_more_is_kept(
    live_bytes: Any, formats: str, kernel: Kernel, remat: Remat
) -> None:
    cfg = CmaeConfig.model_validate(
        {**SMALL, "model": {**SMALL["model"], "remat": remat, "skip_redundant": True}}
    )
    bound = sum(count_activations(cfg, method=Method(FORMATS[formats], kernel, remat)))
    alive = measure(live_bytes, cfg, formats=FORMATS[formats], kernel=kernel)
    assert 0.85 * bound < alive < 0.99 * bound


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("formats", FORMATS)
def test_so_it_is_for_a_hybrid(live_bytes: Any, formats: str, remat: Remat) -> None:
    cfg = CmaeConfig.model_validate({**SMALL, "model": {**HYBRID, "remat": remat}})
    predicted = sum(count_activations(cfg, method=Method(FORMATS[formats], "explicit", remat)))
    assert measure(live_bytes, cfg, formats=FORMATS[formats], kernel="explicit") == pytest.approx(
        predicted, rel=0.02
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": {"weight": 0.0}},
        {"model": {**HYBRID, "feature_decoder": {"depth": 1, "embed_dim": 32, "shared": True}}},
        {"mask": {"ratio": 0.5, "cell": 2}, "target": {"mask_ratio": 0.5, "final_norm": True}},
        {"model": {**HYBRID, "patch_size": 16, "conv": {"dims": (12, 36), "depths": (3, 1)}}},
    ],
    ids=["mae", "shared", "cells", "other sizes"],
)
@pytest.mark.parametrize("formats", ["fp32", "autocast"])
def test_so_it_is_for_other_hybrids(live_bytes: Any, changes: dict[str, Any], formats: str) -> None:
    cfg = CmaeConfig.model_validate({**SMALL, "model": HYBRID, **changes})
    predicted = sum(count_activations(cfg, method=Method(FORMATS[formats], "explicit", "none")))
    assert measure(live_bytes, cfg, formats=FORMATS[formats], kernel="explicit") == pytest.approx(
        predicted, rel=0.02
    )


@pytest.mark.parametrize("formats", FORMATS)
def test_so_it_is_at_the_fullest_moment_of_a_hybrid_target(live_bytes: Any, formats: str) -> None:
    cfg = CmaeConfig.model_validate({**SMALL, "model": HYBRID})
    side, patches = cfg.views.img_px, (cfg.views.img_px // cfg.model.patch_size) ** 2
    encoder = build_cmae(cfg).target_encoder
    assert encoder is not None
    if formats == "bf16":
        encoder.bfloat16()
    peaks = []
    for images in (4, 12):
        views = torch.randn(images, 3, side, side)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=formats == "autocast")
        with live_bytes, torch.no_grad(), autocast:
            live_bytes.watch([views, *encoder.parameters(), *encoder.buffers()])
            before = live_bytes.now
            live_bytes.reset()
            encoder(views, None)
            peaks.append(live_bytes.peak - before)
    stages = plan_encoder(cfg, seen=patches, method=Method(FORMATS[formats], "explicit", "none"))
    assert (peaks[1] - peaks[0]) / 8 == pytest.approx(max(stage.passing for stage in stages), rel=0.02)
