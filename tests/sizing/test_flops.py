from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.layers.attention import AttentionChoice, set_attention_
from cmae_scale.models import build_cmae
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
        {"target": {"mask_ratio": 0.5, "final_norm": True}},
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
        "masked target",
        "other sizes",
        "hybrid",
        "hybrid mae",
        "hybrid of other sizes",
    ],
)
def test_the_closed_form_equals_what_torch_counts(changes: dict[str, Any]) -> None:
    cfg = CmaeConfig.model_validate({**BASE, **changes})
    model = build_cmae(cfg)
    images = torch.rand(2, 3, cfg.views.img_px, cfg.views.img_px)
    set_attention_(model, AttentionChoice("explicit", is_forced=False))  # products that the counter sees
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images, images if cfg.has_contrast else None)
    assert 2 * sum(count_flops(cfg)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("encoder", "gflops"), [("vit_small", 55.8), ("vit_base", 101.2), ("vit_large", 254.9)]
)
def test_training_costs_what_the_paper_sizes_cost_at_maes_mask(encoder: str, gflops: float) -> None:
    """Counted by hand for mask 0.75 with single patches: 49 of 196 visible."""
    cfg = CmaeConfig.model_validate(
        {**BASE, "model": {"encoder": encoder}, "mask": {"ratio": 0.75, "cell": 1}}
    )
    assert count_flops(cfg).training / 1e9 == pytest.approx(gflops, rel=0.01)
