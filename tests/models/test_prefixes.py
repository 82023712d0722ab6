"""Encoders in other people's files: behind any prefix, in any wrapper, beside others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cmae_scale.core.errors import ConfigError
from cmae_scale.models.formats.model_file import choose_branch, read_model_file
from cmae_scale.models.formats.shapes import HeadCounts
from cmae_scale.models.pretrained import open_encoder

HEADS = HeadCounts(encoder=3, pixel_decoder=4, feature_decoder=4)


def nest(state: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def save(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.fixture
def vit(published: Any) -> dict[str, Tensor]:
    state = published.make_mae()
    return {name: t for name, t in state.items() if "decoder" not in name and name != "mask_token"}


PREFIXES = ["module.", "model.", "encoder.", "backbone.", "_orig_mod.", "module.model.encoder.", "net.vit."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "ema"])
def test_an_encoder_is_found_behind_its_prefix(
    tmp_path: Path, vit: dict[str, Tensor], prefix: str, wrapper: str | None
) -> None:
    state = nest(vit, prefix)
    path = save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path)
    found = read_model_file(path, heads=HEADS).part("online_encoder")
    assert found.keys() == vit.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vit.items())


@pytest.mark.parametrize("make", ["make_mae", "make_convmae", "make_cmae"])
@pytest.mark.parametrize("prefix", ["module.", "model.module."])
def test_so_is_a_whole_model_of_every_layout(tmp_path: Path, published: Any, make: str, prefix: str) -> None:
    state = getattr(published, make)()
    plain = read_model_file(save(state, tmp_path), heads=HEADS)
    behind = read_model_file(save(nest(state, prefix), tmp_path), heads=HEADS)
    assert (behind.layout, behind.parts) == (plain.layout, plain.parts)
    assert all(torch.equal(behind.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_of_dinos_two_branches_the_teacher_is_taken_and_told(tmp_path: Path, vit: dict[str, Tensor]) -> None:
    student = {name: tensor + 1 for name, tensor in vit.items()}
    head = {"head.mlp.0.weight": torch.ones(3, 3), "head.last_layer.weight_g": torch.ones(3, 1)}
    content = {
        "student": nest(nest(student, "backbone.") | head, "module."),
        "teacher": nest(vit, "backbone.") | head,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "epoch": 100,
    }
    encoder = open_encoder(str(save(content, tmp_path)), num_heads=3)
    assert torch.equal(encoder.state["norm.weight"], vit["norm.weight"])
    assert "weights taken from teacher.backbone.*" in encoder.notices
    [left_out] = [notice for notice in encoder.notices if "left out" in notice]
    assert left_out == f"left out: student ({len(vit) + 2} tensors), teacher.head (2 tensors)"


def test_a_student_alone_is_taken(tmp_path: Path, vit: dict[str, Tensor]) -> None:
    path = save({"student": nest(vit, "module.backbone.")}, tmp_path)
    assert read_model_file(path, heads=HEADS).notices[0] == "weights taken from student.module.backbone.*"


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("model", "model_ema"), "model"),
        (("state_dict_ema", "state_dict"), "state_dict"),
        (("model", "ema.model"), "model"),
        (("module.momentum_encoder", "module.base_encoder"), "module.base_encoder"),
        (("encoder", "target_encoder"), "target_encoder"),
        (("state_dict.student", "state_dict.teacher"), "state_dict.teacher"),
        (("left", "right"), None),
        (("a.model", "b.model"), None),
        (("model.left", "model.right", "ema"), None),
    ],
)
def test_of_several_encoders_the_known_one_is_taken_or_none(
    names: tuple[str, ...], taken: str | None
) -> None:
    tensors = {f"{name}.patch_embed.proj.weight": torch.tensor(float(i)) for i, name in enumerate(names)}
    if taken is None:
        with pytest.raises(ConfigError, match=r"w\.pth holds several encoders .*of their own$"):
            choose_branch(tensors, path=Path("w.pth"))
    else:
        branch = choose_branch(tensors, path=Path("w.pth"))
        assert float(branch.tensors["patch_embed.proj.weight"]) == names.index(taken)


@given(words=st.lists(st.text("abc_", min_size=1, max_size=5), min_size=1, max_size=4, unique=True))
def test_whatever_stands_before_the_names_is_taken_off(words: list[str]) -> None:
    prefix = "".join(f"{word}." for word in words)
    names = ["patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight"]
    branch = choose_branch({prefix + name: torch.ones(1) for name in names}, path=Path("w.pth"))
    assert list(branch.tensors) == names


def test_unknown_names_beside_the_encoders_own_are_still_refused(
    tmp_path: Path, vit: dict[str, Tensor]
) -> None:
    path = save(nest(vit | {"reg_token": torch.ones(1, 4, 24)}, "module."), tmp_path)
    with pytest.raises(ConfigError, match="none of the names of MAE, ConvMAE and timm: reg_token"):
        read_model_file(path, heads=HEADS)


def test_a_projector_in_place_of_a_classifier_is_left_out_and_told(
    tmp_path: Path, vit: dict[str, Tensor]
) -> None:
    path = save(nest(vit | {"head.0.weight": torch.ones(4, 24)}, "module.base_encoder."), tmp_path)
    file = read_model_file(path, heads=HEADS)
    assert file.parts == ["online_encoder"]
    assert "left out: head.0.weight" in file.notices
