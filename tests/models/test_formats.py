"""Files of other projects: read whole, checked, and computing what the code that they are from computes."""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.sizes import read_size
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.tokens import patchify, take_tokens
from cmae_scale.losses import infonce, pixel_loss
from cmae_scale.models import CMAE, build_cmae, read_classifier
from cmae_scale.models.build import build_encoder
from cmae_scale.models.formats.folders import write_classifier, write_timm
from cmae_scale.models.formats.model_file import ModelFile, check_whole, read_model_file
from cmae_scale.models.formats.names import find_layout, to_ours
from cmae_scale.models.formats.shapes import MEAN, STD, HeadCounts, ShapeReader
from cmae_scale.models.initial import start_from_

BATCH, SIDE, PATCH, GRID = 4, 24, 4, 6
HEADS = HeadCounts(encoder=3, pixel_decoder=4, feature_decoder=4)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=rng)


@pytest.fixture
def noise(rng: torch.Generator) -> Tensor:
    return torch.rand(BATCH, 9, generator=rng)


def hidden_by(noise: Tensor) -> Tensor:
    """1 for hidden patches: of 9 cells of 2 x 2 the int(9 * 0.35) = 3 with the lowest noise stay."""
    cells = torch.ones(BATCH, 9).scatter(1, noise.argsort(dim=1)[:, :3], 0.0).view(BATCH, 3, 3)
    return cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1)


def write_mae_file(state: dict[str, Tensor], path: Path) -> Path:
    """As facebookresearch/mae util/misc.py saves it."""
    args = argparse.Namespace(batch_size=64, lr=None, output_dir="out", pin_mem=True, dist_url="env://")
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    whole = {"model": state, "optimizer": optimizer, "epoch": 799, "scaler": scaler, "args": args}
    torch.save(whole, path)
    return path


def write_mm_file(state: dict[str, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As mmengine's runner saves it, with the log buffers that are objects of its own."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log_history = np.arange(3.0)

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def mean(self) -> float:
            return float(self.log_history.mean())

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for name in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, module.__name__, module)
        hub = {"log_scalars": {"train/loss": HistoryBuffer()}, "runtime_info": {"iter": 3}}
        meta = {"epoch": 300, "cfg": "model = ...", "seed": 60}
        torch.save({"meta": meta, "state_dict": state, "message_hub": hub}, path)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr"} <= set(foreign)
    return path


def load(file: ModelFile) -> CMAE:
    run = {**file.cfg.model_dump(), "data": {"shards": "none"}}
    model = build_cmae(CmaeConfig.model_validate(run))
    model.load_state_dict(file.tensors)
    return model


def pixel_loss_of(model: CMAE, images: Tensor, noise: Tensor) -> Tensor:
    output = model(images, None, noise=noise)
    return pixel_loss(output.pixels, take_tokens(patchify(images, PATCH), output.mask.hidden))


def test_a_pretrained_mae_gives_its_own_loss(
    tmp_path: Path, published: Any, images: Tensor, noise: Tensor
) -> None:
    state = published.make_mae()
    file = read_model_file(write_mae_file(state, tmp_path / "mae.pth"), heads=HEADS)
    assert (file.layout, file.parts) == ("mae", ["online_encoder", "pixel_decoder"])
    expected = published.mae_loss(state, images, hidden_by(noise))
    torch.testing.assert_close(pixel_loss_of(load(file), images, noise), expected, **CLOSE)


def test_a_pretrained_convmae_gives_its_own_loss(
    tmp_path: Path, published: Any, images: Tensor, noise: Tensor
) -> None:
    state = published.make_convmae()
    file = read_model_file(write_mae_file(state, tmp_path / "convmae.pth"), heads=HEADS)
    assert file.cfg.model.conv.dims == (8, 12)
    assert file.cfg.model.patch_size == PATCH
    expected = published.convmae_loss(state, images, hidden_by(noise))
    torch.testing.assert_close(pixel_loss_of(load(file), images, noise), expected, **CLOSE)


def test_an_official_cmae_gives_both_of_its_losses(
    tmp_path: Path, published: Any, images: Tensor, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = published.make_cmae()
    path = write_mm_file(state, tmp_path / "cmae.pth", monkeypatch)
    file = read_model_file(path, heads=HEADS)
    assert file.layout == "cmae"
    assert file.is_bgr
    target = images.flip(0) + 0.1 * images
    output = load(file)(images, target, noise=noise)
    pixel = pixel_loss(output.pixels, take_tokens(patchify(images, PATCH), output.mask.hidden))
    contrast = 0.14 * infonce(output.query, output.key, first_row=0, temperature=0.07)
    expected = published.cmae_losses(state, images, target, hidden_by(noise), heads=3)
    torch.testing.assert_close((pixel, contrast), expected, **CLOSE)


def test_weights_for_bgr_images_give_the_same_features_on_rgb(
    tmp_path: Path, published: Any, noise: Tensor, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The official pipeline: swap the channels, then take RGB's mean and std."""
    path = write_mm_file(published.make_cmae(), tmp_path / "cmae.pth", monkeypatch)
    file = read_model_file(path, heads=HEADS)
    rgb = torch.rand(2, BATCH, 3, SIDE, SIDE, generator=rng)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    official, ours = (rgb.flip(2) - mean) / std, (rgb - mean) / std
    swapped = file.to_rgb()
    assert not swapped.is_bgr
    theirs = load(file)(*official, noise=noise)
    output = load(swapped)(*ours, noise=noise)
    torch.testing.assert_close((output.query, output.key), (theirs.query, theirs.key), rtol=1e-4, atol=1e-4)
    in_rgb = theirs.pixels.view(BATCH, -1, PATCH**2, 3).flip(-1).flatten(2)
    torch.testing.assert_close(output.pixels, in_rgb, rtol=1e-4, atol=1e-4)


def test_the_official_cmae_base_is_read_at_its_size(published: Any) -> None:
    sizes = published.sizes(
        width=768, depth=12, patch=16, grid=14, decoder_width=512, decoder_depth=8, hidden=1536, out=256
    )
    state = published.make_cmae(sizes=sizes, device="meta")
    counted = [tensor for name, tensor in state.items() if "running_" not in name and "num_" not in name]
    assert sum(tensor.numel() for tensor in counted) == 208_845_824
    renamed = to_ours(state, find_layout(list(state)))
    assert renamed.unknown == []
    reader = ShapeReader(renamed.tensors, heads=HeadCounts())
    cfg = reader.config()
    check_whole(renamed.tensors, cfg, path=Path("cmae.pth"))
    assert read_size(cfg.model) == (768, 12, 12)
    assert (cfg.model.pixel_decoder.num_heads, cfg.model.feature_decoder.num_heads) == (16, 16)
    assert (cfg.heads.hidden_dim, cfg.heads.out_dim, cfg.views.img_px) == (1536, 256, 224)
    assert len(reader.notices) == 3


def test_an_extracted_official_backbone_is_read(tmp_path: Path, published: Any) -> None:
    """What tools/extract_backbone_weights.py leaves: no prefix."""
    whole = published.make_cmae()
    backbone = {n.removeprefix("backbone."): t for n, t in whole.items() if n.startswith("backbone.")}
    torch.save({"state_dict": backbone, "author": "CMAE"}, tmp_path / "backbone.pth")
    file = read_model_file(tmp_path / "backbone.pth", heads=HEADS)
    assert file.parts == ["online_encoder"]
    assert torch.equal(file.part("online_encoder")["norm.weight"], whole["backbone.ln1.weight"])


@pytest.mark.parametrize("kind", ["mae", "cmae"])
def test_a_fine_tuned_model_gives_its_own_logits_in_timm(
    tmp_path: Path, published: Any, images: Tensor, kind: str
) -> None:
    import timm

    if kind == "mae":
        state, prefix, head, how = published.make_mae(classes=5), "", "head", {}
    else:
        state, prefix, head = published.make_cmae(classes=5), "backbone.", "head.head"
        how = {"prefix": prefix, "names": published.mm_names}
    torch.save({"model" if kind == "mae" else "state_dict": state}, tmp_path / "tuned.pth")
    tokens = published.encode_vit(state, images, torch.zeros(BATCH, GRID**2), **how)
    pooled = published.norm(state, f"{prefix}fc_norm", tokens[:, 1:].mean(dim=1), 1e-6)
    expected = published.linear(state, head, pooled)
    write_timm(read_model_file(tmp_path / "tuned.pth", heads=HEADS), tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), expected, **CLOSE)


def test_a_fine_tuned_convmae_gives_its_own_logits(tmp_path: Path, published: Any, images: Tensor) -> None:
    state = published.make_convmae(classes=5)
    file = read_model_file(write_mae_file(state, tmp_path / "tuned.pth"), heads=HEADS)
    write_classifier(file, tmp_path / "classifier")
    classifier = read_classifier(tmp_path / "classifier")
    tokens = published.run_convmae_stages(state, images, torch.zeros(BATCH, GRID**2), heads=3)[2]
    expected = published.linear(state, "head", published.norm(state, "fc_norm", tokens.mean(dim=1), 1e-6))
    torch.testing.assert_close(classifier(images), expected, **CLOSE)


def test_an_encoder_alone_is_read_without_its_decoder(tmp_path: Path, published: Any) -> None:
    """What MAE publishes for fine-tuning: the pre-trained encoder with its norm, nothing else."""
    state = {name: tensor for name, tensor in published.make_mae().items() if "decoder" not in name}
    del state["mask_token"]
    save_file(state, tmp_path / "encoder.safetensors")
    file = read_model_file(tmp_path / "encoder.safetensors", heads=HEADS)
    assert file.parts == ["online_encoder"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks.0.ls1.gamma": torch.ones(24)}, r"too many.*blocks\.0\.ls1\.gamma"),
        ({"reg_token": torch.ones(1, 4, 24)}, "none of the names of MAE, ConvMAE and timm: reg_token"),
        ({"blocks.1.mlp.fc1.bias": None}, r"lacks 1 tensors.*blocks\.1\.mlp\.fc1\.bias"),
        ({"decoder_pred.weight": None, "decoder_pred.bias": None}, r"lacks 2 tensors.*predict\.weight"),
        ({"blocks.0.attn.proj.weight": torch.ones(24, 23)}, r"\[24, 23\] instead of \[24, 24\]"),
        ({"pos_embed": torch.ones(1, 36, 24)}, "no square"),
        ({"norm.weight": None}, r"lacks 1 tensors.*online_encoder\.norm\.weight"),
        ({"blocks.0.norm1.weight": None}, r"no blocks online_encoder\.blocks\.0"),
        ({"cls_token": None}, r"lacks 1 tensors.*cls_token"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_listed(
    tmp_path: Path, published: Any, change: dict[str, Tensor | None], told: str
) -> None:
    state = {n: t for n, t in (published.make_mae() | change).items() if t is not None}
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(ConfigError, match=told):
        read_model_file(tmp_path / "mae.pth", heads=HEADS)


def test_heads_that_no_shape_tells_are_asked_for(tmp_path: Path, published: Any) -> None:
    torch.save(published.make_mae(), tmp_path / "mae.pth")
    with pytest.raises(ConfigError, match="--num_heads N"):
        read_model_file(tmp_path / "mae.pth")
    with pytest.raises(ConfigError, match="--decoder_heads N"):
        read_model_file(tmp_path / "mae.pth", heads=HeadCounts(encoder=3))


def test_tensors_of_nobody_known_are_refused(tmp_path: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.ones(3)}, tmp_path / "resnet.pth")
    with pytest.raises(ConfigError, match="no known encoder among 1 tensors"):
        read_model_file(tmp_path / "resnet.pth")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


class Climber:
    """Reaches for a function through getattr, which log buffers need too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return getattr(self.path, "touch"), ()  # noqa: B009


@pytest.mark.parametrize("place", ["args", "message_hub"])
@pytest.mark.parametrize("kind", [Payload, Climber])
def test_code_beside_good_weights_is_refused_and_never_runs(
    tmp_path: Path, published: Any, place: str, kind: type[Any]
) -> None:
    torch.save({"model": published.make_mae(), place: kind(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        read_model_file(tmp_path / "evil.pth", heads=HEADS)
    assert not (tmp_path / "ran").exists()


def build_run(**sections: Any) -> tuple[CMAE, CmaeConfig]:
    """A CMAE of the size that the made-up official model has."""
    run: dict[str, Any] = {
        "model": {
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "patch_size": PATCH,
            "pixel_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 4},
            "feature_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 4},
        },
        "data": {"shards": "shards"},
        "views": {"img_px": SIDE, "master_px": SIDE, "shift_px": 1},
        "heads": {"hidden_dim": 20, "out_dim": 12},
    }
    for name, section in sections.items():
        run[name] = {**run.get(name, {}), **section}
    cfg = CmaeConfig.model_validate(run)
    return build_cmae(cfg), cfg


def test_a_run_goes_on_from_the_whole_official_model(
    tmp_path: Path, published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_mm_file(published.make_cmae(), tmp_path / "cmae.pth", monkeypatch)
    model, cfg = build_run()
    told = start_from_(model, cfg, path=path)
    expected = read_model_file(path, heads=HEADS).to_rgb().tensors
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert "target_projector" in told[0]
    assert not any("new" in line or "left out" in line or "copy" in line for line in told)
    assert any("BGR" in line for line in told)


def test_what_a_file_lacks_starts_by_the_rules_and_is_reported(tmp_path: Path, published: Any) -> None:
    """From MAE: the target copies the online branch, also its positions; the rest is as the seed has it."""
    path = tmp_path / "mae.pth"
    torch.save({"model": published.make_mae()}, path)
    model, cfg = build_run(model={"embed_dim": 24})
    fresh, _ = build_run(model={"embed_dim": 24})
    told = start_from_(model, cfg, path=path)
    state, before = model.state_dict(), fresh.state_dict()
    assert torch.equal(state["online_encoder.pos_embed"], published.make_mae()["pos_embed"])
    for name, tensor in state.items():
        branch, _, rest = name.partition(".")
        match branch:
            case "target_encoder":
                assert torch.equal(tensor, state[f"online_encoder.{rest}"]), name
            case "target_projector":
                assert torch.equal(tensor, state[f"projector.{rest}"]), name
            case "feature_decoder" | "projector" | "predictor":
                assert torch.equal(tensor, before[name]), name
            case _:
                assert not torch.equal(tensor, before[name]), name
    assert told == [
        f"started from {path} (names of MAE, ConvMAE and timm): online_encoder, pixel_decoder",
        "target_encoder, target_projector: a copy of the online branch where mae.pth has none",
        "new, from the seed: feature_decoder, predictor, projector",
    ]


def test_what_a_run_has_no_use_for_is_left_out_and_reported(tmp_path: Path, published: Any) -> None:
    torch.save({"state_dict": published.make_cmae()}, tmp_path / "cmae.pth")
    model, cfg = build_run(loss={"weight": 0.0})
    told = start_from_(model, cfg, path=tmp_path / "cmae.pth")
    left = "left out: feature_decoder, predictor, projector, target_encoder, target_projector"
    assert told[-1] == left


def test_a_fine_tuned_encoder_starts_a_run_with_a_new_norm(tmp_path: Path, published: Any) -> None:
    torch.save({"model": published.make_mae(classes=5)}, tmp_path / "tuned.pth")
    model, cfg = build_run(model={"embed_dim": 24})
    told = start_from_(model, cfg, path=tmp_path / "tuned.pth")
    assert any("online_encoder.norm.weight" in line for line in told)
    assert told[-1] == "left out: classifier"


@pytest.mark.parametrize(
    "section", [{"embed_dim": 24}, {"pixel_decoder": {"depth": 2, "embed_dim": 32, "num_heads": 4}}]
)
def test_a_file_of_another_size_cannot_start_a_run(
    tmp_path: Path, published: Any, section: dict[str, Any]
) -> None:
    torch.save({"state_dict": published.make_cmae()}, tmp_path / "cmae.pth")
    model, cfg = build_run(model=section)
    with pytest.raises(ConfigError, match="is a model of another size or kind"):
        start_from_(model, cfg, path=tmp_path / "cmae.pth")


@pytest.mark.parametrize("depth", [1, 3])
def test_a_file_of_another_depth_cannot_start_a_run(tmp_path: Path, published: Any, depth: int) -> None:
    torch.save({"state_dict": published.make_cmae()}, tmp_path / "cmae.pth")
    model, cfg = build_run(model={"depth": depth})
    with pytest.raises(ConfigError, match=r"blocks\.[12]\..* absent"):
        start_from_(model, cfg, path=tmp_path / "cmae.pth")


def test_a_hybrid_cannot_start_a_plain_encoder(tmp_path: Path, published: Any) -> None:
    torch.save({"model": published.make_convmae()}, tmp_path / "convmae.pth")
    model, cfg = build_run(model={"embed_dim": 24})
    with pytest.raises(ConfigError, match="is a model of another size or kind"):
        start_from_(model, cfg, path=tmp_path / "convmae.pth")


def test_shapes_alone_build_the_same_encoder(tmp_path: Path, published: Any) -> None:
    torch.save({"model": published.make_convmae()}, tmp_path / "convmae.pth")
    file = read_model_file(tmp_path / "convmae.pth", heads=HEADS)
    build_encoder(file.cfg.model, img_px=file.cfg.views.img_px).load_state_dict(file.part("online_encoder"))
