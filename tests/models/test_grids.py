"""Every patch grid that an encoder can have goes out and comes back: no mask setting has a say in it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.config.cmae import CmaeConfig, ConvConfig, ModelConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.models import CMAE, build_cmae, read_description
from cmae_scale.models.formats import folders
from cmae_scale.models.formats.model_file import ModelFile, read_model_file
from cmae_scale.models.initial import start_from_
from cmae_scale.models.pretrained import open_encoder
from cmae_scale.models.weights import WEIGHTS_FILE, export_encoder

SIZES = [(32, 16), (28, 4), (224, 32), (36, 4), (240, 16), (98, 14), (518, 14), (60, 12), (176, 16)]
PLAIN = ModelConfig(
    embed_dim=24,
    depth=1,
    num_heads=3,
    pixel_decoder={"depth": 1, "embed_dim": 16, "num_heads": 4},  # type: ignore[arg-type]
    feature_decoder={"depth": 1, "embed_dim": 16, "num_heads": 4},  # type: ignore[arg-type]
)
HYBRID = PLAIN.model_copy(update={"conv": ConvConfig(dims=(8, 12), depths=(1, 1))})
CASES = [
    pytest.param(model, img_px, patch_size, id=f"{name} {img_px} px in patches of {patch_size}")
    for name, model in (("plain", PLAIN), ("hybrid", HYBRID))
    for img_px, patch_size in SIZES
    if name == "plain" or patch_size % 4 == 0
]


def build_run(model: ModelConfig, img_px: int, patch_size: int, **sections: Any) -> tuple[CmaeConfig, CMAE]:
    """A run that hides single patches."""
    run = {
        "model": {**model.model_dump(), "patch_size": patch_size},
        "data": {"shards": "none"},
        "views": {"img_px": img_px, "master_px": img_px, "shift_px": 1},
        "heads": {"hidden_dim": 20, "out_dim": 12},
        "mask": {"cell": 1, "ratio": 0.5},
        **sections,
    }
    cfg = CmaeConfig.model_validate(run)
    return cfg, build_cmae(cfg)


@pytest.mark.parametrize(("model", "img_px", "patch_size"), CASES)
def test_an_export_of_any_grid_is_read_and_written_in_every_format(
    tmp_path: Path, model: ModelConfig, img_px: int, patch_size: int
) -> None:
    cfg, built = build_run(model, img_px, patch_size)
    state = built.online_encoder.state_dict()
    export_encoder(state, tmp_path / "run", model=cfg.model, views=cfg.views)
    file = read_model_file(tmp_path / "run")
    assert file.cfg.views.img_px == img_px
    formats = {"encoder": folders.write_encoder}
    if not cfg.model.is_hybrid:
        formats |= {"timm": folders.write_timm, "huggingface": folders.write_huggingface}
    for name, write in formats.items():
        write(file, tmp_path / name)
        back = read_model_file(tmp_path / name)
        assert back.cfg.views.img_px == img_px
        for tensor, values in back.part("online_encoder").items():
            assert torch.equal(values, state[tensor]), (name, tensor)
    assert read_description(tmp_path / "encoder").img_px == img_px
    alone = open_encoder(str(tmp_path / "run" / WEIGHTS_FILE), num_heads=3)
    assert alone.args["img_size"] == img_px


@pytest.mark.parametrize(("model", "img_px", "patch_size"), CASES)
def test_a_whole_model_of_any_grid_starts_a_run(
    tmp_path: Path, model: ModelConfig, img_px: int, patch_size: int
) -> None:
    cfg, built = build_run(model, img_px, patch_size)
    state = built.state_dict()
    file = ModelFile(tmp_path / "all", "ours", state, cfg, cfg.views.mean, cfg.views.std, False, ())
    folders.write_whole(file, file.path)
    _, other = build_run(model, img_px, patch_size, seed=7)
    start_from_(other, cfg, path=file.path)
    assert all(torch.equal(values, state[name]) for name, values in other.state_dict().items())


def test_sizes_that_make_no_model_are_told_in_words(tmp_path: Path) -> None:
    cfg, built = build_run(PLAIN, 28, 4)
    export_encoder(built.online_encoder.state_dict(), tmp_path, model=cfg.model, views=cfg.views)
    with pytest.raises(ConfigError, match=r"embed_dim 24 is not a multiple of num_heads 7$"):
        open_encoder(str(tmp_path / WEIGHTS_FILE), num_heads=7)


@pytest.mark.parametrize(("grid", "cell", "remedy"), [(7, 2, 1), (15, 2, 1), (9, 6, 3), (10, 4, 2)])
def test_a_run_whose_cells_do_not_fit_is_told_which_do(grid: int, cell: int, remedy: int) -> None:
    with pytest.raises(ValueError, match=f"does not divide the {grid} x {grid} patch grid .*cell {remedy}"):
        build_run(PLAIN, 4 * grid, 4, mask={"cell": cell})
