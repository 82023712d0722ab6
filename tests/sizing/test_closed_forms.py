"""Parameters and buffers in closed form beside the model that is built."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.run_file import read_run
from cmae_scale.models import CMAE
from cmae_scale.models.hybrid import SiteProjection
from cmae_scale.sizing.parameters import (
    count_buffers,
    count_encoder,
    count_parameters,
    count_reordered,
    count_rounded,
    count_sent_rounded,
)

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
TINY: dict[str, Any] = {"model": {"encoder": "vit_tiny"}, "data": {"shards": "x"}}
HYBRID: dict[str, Any] = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "conv": {"dims": (11, 20), "depths": (1, 3), "mlp_ratio": 2.7},
}
# of what is trained and runs under autocast: all heads run outside of it
PRODUCTS = ("Linear", "Conv2d", "PatchProjection", "StemProjection", "SiteProjection", "MergeProjection")
ODD = [
    {"loss": {"weight": 0.0}},
    {"model": {"encoder": "vit_tiny", "feature_decoder": {"depth": 0}}},
    {"model": {"encoder": "vit_tiny", "feature_decoder": {"depth": 3, "shared": True}}},
    {"target": {"final_norm": True}},
    {"heads": {"norm": "layer", "hidden_dim": 33, "out_dim": 7}},
    {
        "model": {
            "embed_dim": 60,
            "depth": 2,
            "num_heads": 5,
            "mlp_ratio": 2.7,
            "patch_size": 8,
            "pixel_decoder": {"depth": 1, "embed_dim": 28, "num_heads": 7, "mlp_ratio": 1.3},
            "feature_decoder": {"depth": 4, "embed_dim": 20, "num_heads": 2},
        }
    },
    {"model": {"encoder": "convvit_small"}, "loss": {"weight": 0.0}},
    {"model": {"encoder": "convvit_large"}},
    {"model": HYBRID, "target": {"final_norm": True}},
    {"model": {**HYBRID, "feature_decoder": {"depth": 0}}},
]


def check(cfg: CmaeConfig) -> None:
    with torch.device("meta"):
        model = CMAE(cfg, mask=cfg.mask)
    counts = count_parameters(cfg)
    for part, counted in counts._asdict().items():
        module = getattr(model, part)
        built = 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
        assert counted == built, part
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_buffers(cfg) == sum(buffer.numel() for buffer in model.buffers())
    trained = [module for name, module in model.named_modules() if not name.startswith("target")]
    rounded = [module.weight.numel() for module in trained if type(module).__name__ in PRODUCTS]
    assert count_rounded(cfg) == sum(rounded)
    sent = [
        p.numel()
        for module in trained
        if type(module) in LOWER_PRECISION_SAFE_MODULES
        for p in module.parameters()
    ]
    assert count_sent_rounded(cfg) == sum(sent)
    reordered = [m.weight.numel() for m in trained if isinstance(m, SiteProjection) and m.side > 1]
    assert count_reordered(cfg.model) == sum(reordered)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_model_is_counted_to_the_parameter(path: Path) -> None:
    check(read_run(path).cmae)


@pytest.mark.parametrize("changes", ODD)
def test_so_are_models_with_odd_settings(changes: dict[str, Any]) -> None:
    check(CmaeConfig.model_validate({**TINY, **changes}))


def test_a_hybrid_is_counted_stage_by_stage() -> None:
    cfg = CmaeConfig.model_validate({**TINY, "model": HYBRID})
    with torch.device("meta"):
        encoder = CMAE(cfg, mask=cfg.mask).online_encoder
    stages = (("patch_embed1", "blocks1"), ("patch_embed2", "blocks2"))
    built = [
        sum(p.numel() for part in stage for p in getattr(encoder, part).parameters()) for stage in stages
    ]
    rest = sum(p.numel() for p in encoder.parameters()) - sum(built)
    assert count_encoder(cfg.model, final_norm=True) == (*built, rest)


def test_the_sizes_of_the_published_hybrid_come_out() -> None:
    model = {"encoder": "convvit_base"}
    alone = CmaeConfig.model_validate({**TINY, "model": model, "loss": {"weight": 0.0}})
    both = CmaeConfig.model_validate({**TINY, "model": model})
    positions = 14**2 * 768  # fixed here, a parameter without gradient there
    assert count_parameters(alone).online_encoder + positions == 88_932_736
    assert count_parameters(alone).trained == 114_790_528
    assert count_parameters(both).trained == 124_253_056
