"""Parameters and buffers in closed form beside the model that is built."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.core.config import read_run
from cmae_scale.core.settings import CmaeConfig
from cmae_scale.models import CMAE
from cmae_scale.sizing.parameters import count_buffers, count_parameters, count_rounded

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
CONFIGS = sorted(set(FOLDER.glob("*.json")) - {FOLDER / "convvitb.json"})  # a hybrid is not counted yet
TINY: dict[str, Any] = {"model": {"encoder": "vit_tiny"}, "data": {"shards": "x"}}
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
]


def check(cfg: CmaeConfig) -> None:
    with torch.device("meta"):
        model = CMAE(cfg)
    counts = count_parameters(cfg)
    for part, counted in counts._asdict().items():
        module = getattr(model, part)
        built = 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
        assert counted == built, part
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_buffers(cfg) == sum(buffer.numel() for buffer in model.buffers())
    rounded = [
        module.weight.numel()
        for name, module in model.named_modules()
        # linear layers and the patch embedding of what is trained; all heads run outside of autocast
        if type(module).__name__ in ("Linear", "PatchProjection") and not name.startswith("target")
    ]
    assert count_rounded(cfg) == sum(rounded)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_model_is_counted_to_the_parameter(path: Path) -> None:
    check(read_run(path).cmae)


@pytest.mark.parametrize("changes", ODD)
def test_so_are_models_with_odd_settings(changes: dict[str, Any]) -> None:
    check(CmaeConfig.model_validate({**TINY, **changes}))
