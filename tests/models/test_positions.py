"""Weights of one image size in a run of another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.tokens import sincos_positions
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.models.formats.folders import write_whole
from cmae_scale.models.formats.model_file import ModelFile
from cmae_scale.models.formats.shapes import refit_positions
from cmae_scale.models.initial import start_from_

PATCH = 4


def build_run(grid: int, *, seed: int = 0, **model: Any) -> tuple[CMAE, CmaeConfig]:
    decoder = {"depth": 1, "embed_dim": 16, "num_heads": 4}
    run = {
        "model": {
            **{"embed_dim": 24, "depth": 1, "num_heads": 3, "patch_size": PATCH},
            **{"pixel_decoder": decoder, "feature_decoder": decoder, **model},
        },
        "data": {"shards": "none"},
        "mask": {"cell": 1, "ratio": 0.5},
        "views": {"img_px": PATCH * grid, "master_px": PATCH * grid, "shift_px": 1},
        "heads": {"hidden_dim": 20, "out_dim": 12},
        "seed": seed,
    }
    cfg = CmaeConfig.model_validate(run)
    return build_cmae(cfg), cfg


def swap_halves(positions: Tensor) -> Tensor:
    """MAE's order: columns before rows."""
    rows, columns = positions.chunk(2, dim=2)
    return torch.cat([columns, rows], dim=2)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (3, 12), (14, 5), (6, 1)])
@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_positions_are_those_of_the_new_grid(old: int, new: int, cls: bool, dtype: torch.dtype) -> None:
    ours, expected = (sincos_positions(grid, 24, cls=cls) for grid in (old, new))
    for given, wanted in ((ours, expected), (swap_halves(ours), swap_halves(expected))):
        refitted = refit_positions(given.to(dtype), grid=new)
        assert refitted.is_computed
        assert torch.equal(refitted.positions, wanted)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_learned_positions_are_interpolated(old: int, new: int, prefix: int, rng: torch.Generator) -> None:
    learned = torch.randn(1, old**2 + prefix, 24, generator=rng)
    refitted = refit_positions(learned, grid=new)
    assert not refitted.is_computed
    expected = resample_abs_pos_embed(learned, new_size=[new, new], num_prefix_tokens=prefix)
    assert torch.equal(refitted.positions, expected)


@pytest.mark.parametrize("conv", [None, {"dims": (8, 12), "depths": (1, 1)}], ids=["plain", "hybrid"])
@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 5)])
def test_a_run_starts_from_weights_of_another_image_size(
    tmp_path: Path, conv: Any, old: int, new: int
) -> None:
    whole, cfg = build_run(old, conv=conv)
    state = whole.state_dict()
    write_whole(ModelFile(tmp_path, "ours", state, cfg, cfg.views.mean, cfg.views.std, False, ()), tmp_path)
    run, run_cfg = build_run(new, seed=3, conv=conv)
    fresh = {name: tensor.clone() for name, tensor in run.state_dict().items()}
    told = start_from_(run, run_cfg, path=tmp_path)
    for name, tensor in run.state_dict().items():
        assert torch.equal(tensor, fresh[name] if "pos_embed" in name else state[name]), name
    notice = f"positions of its {old} x {old} patches are fixed, so computed for {new} x {new}"
    assert (notice in told) == (old != new)


def test_other_patches_are_still_another_model(tmp_path: Path) -> None:
    whole, cfg = build_run(4)
    file = ModelFile(tmp_path, "ours", whole.state_dict(), cfg, cfg.views.mean, cfg.views.std, False, ())
    write_whole(file, tmp_path)
    run, run_cfg = build_run(4, patch_size=2)
    with pytest.raises(ConfigError, match=r"patch_embed.*give cmae\.model and cmae\.heads the file's sizes"):
        start_from_(run, run_cfg, path=tmp_path)
