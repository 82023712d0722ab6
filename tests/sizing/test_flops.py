from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.layers.attention import AttentionChoice, set_attention_
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.sizing.flops import count_flops

BASE: dict[str, Any] = {"model": {"encoder": "vit_tiny"}, "data": {"shards": "x"}}

HYBRID: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "conv": {"dims": (12, 20), "depths": (1, 2), "mlp_ratio": 2.5},
}


@pytest.mark.slow_unless(changes={})
@pytest.mark.slow_unless(changes={"model": HYBRID})
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"weight": 0.0}, "mask": {"ratio": 0.75, "cell": 1}},
        {"model": {"encoder": "vit_tiny", "feature_decoder": {"depth": 2, "shared": True}}},
        {"model": {"encoder": "vit_tiny", "feature_decoder": {"depth": 0}}},
        {"model": {"encoder": "vit_tiny", "feature_decoder": {"depth": 8, "shared": True}}},
        {"model": {"encoder": "vit_tiny", "pixel_decoder": {"depth": 1}}},
        {"target": {"mask_ratio": 0.5, "final_norm": True}},
        {"target": {"mask_ratio": 0.5}},
        {"target": {"pool": "cls"}},
        {"model": {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 8, "mlp_ratio": 3.0}},
        {"model": HYBRID},
        {"model": HYBRID, "loss": {"weight": 0.0}, "mask": {"ratio": 0.75, "cell": 1}},
        {"model": {**HYBRID, "patch_size": 8}, "target": {"mask_ratio": 0.5}},
    ],
    ids=[
        "cmae",
        "mae",
        "shared",
        "no feature decoder",
        "all shared",
        "one pixel block",
        "target with norm",
        "masked target",
        "class token",
        "other sizes",
        "hybrid",
        "hybrid mae",
        "hybrid of other sizes",
    ],
)
@pytest.mark.parametrize("skip", [False, True], ids=["all", "skip_redundant"])
def test_the_closed_form_equals_what_torch_counts(changes: dict[str, Any], skip: bool) -> None:
    cfg = read({**changes, "model": {**BASE["model"], **changes.get("model", {}), "skip_redundant": skip}})
    model = build_cmae(cfg)
    images = torch.rand(2, 3, cfg.views.img_px, cfg.views.img_px)
    set_attention_(model, AttentionChoice("explicit", is_forced=False))  # products that the counter sees
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images, images if cfg.has_contrast else None)
    shared = count_shared(cfg) if skip else 0
    assert 2 * sum(count_flops(cfg)) + shared == counter.get_total_flops()


def read(changes: dict[str, Any]) -> CmaeConfig:
    if "embed_dim" in changes["model"]:
        changes["model"].pop("encoder")
    return CmaeConfig.model_validate({**BASE, **changes})


def count_shared(cfg: CmaeConfig) -> int:
    """Query, key and value of one empty sequence in every decoder, however many images there are."""
    feature, decoders = cfg.model.feature_decoder, [cfg.model.pixel_decoder.embed_dim]
    if cfg.has_contrast and feature.depth and not feature.shared:
        decoders.append(feature.embed_dim)
    tokens = (cfg.views.img_px // cfg.model.patch_size) ** 2 + (not cfg.model.is_hybrid)
    return sum(2 * tokens * 3 * width**2 for width in decoders)


@pytest.mark.parametrize(
    ("encoder", "saved"), [("vit_small", 0.0425), ("vit_base", 0.0304), ("vit_large", 0.0149)]
)
def test_of_a_training_step_so_much_is_redundant(encoder: str, saved: float) -> None:
    """Of a micro-batch of 128 by torch's count, at MAE's mask; what images share is in it."""
    whole, short = (count_training(encoder, skip=skip, images=128) for skip in (False, True))
    assert 1 - short / whole == pytest.approx(saved, abs=1e-4)


def count_training(encoder: str, *, skip: bool, images: int) -> int:
    """Operations of forward and backward pass as torch counts them, without computing them."""
    cfg = read({"model": {"encoder": encoder, "skip_redundant": skip}, "mask": {"ratio": 0.75, "cell": 1}})
    with FakeTensorMode():
        model = CMAE(cfg, mask=cfg.mask)
        set_attention_(model, AttentionChoice("explicit", is_forced=False))
        views, noise = torch.rand(images, 3, 224, 224), torch.rand(images, 196)
        counter = FlopCounterMode(display=False)
        with counter:
            output = model(views, views, noise=noise)
            (output.pixels.sum() + output.query.sum()).backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("encoder", "gflops"), [("vit_small", 55.8), ("vit_base", 101.2), ("vit_large", 254.9)]
)
def test_training_costs_what_the_paper_sizes_cost_at_maes_mask(encoder: str, gflops: float) -> None:
    """Counted by hand for mask 0.75 with single patches: 49 of 196 visible."""
    cfg = CmaeConfig.model_validate(
        {**BASE, "model": {"encoder": encoder}, "mask": {"ratio": 0.75, "cell": 1}}
    )
    assert count_flops(cfg).training / 1e9 == pytest.approx(gflops, rel=0.01)
