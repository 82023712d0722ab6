"""The command that brings weights from and to other projects."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from cmae_scale.convert import FORMATS, find_writer, main
from cmae_scale.models import read_encoder

SIZES = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
HEADS = ["--num_heads", "3"]


@pytest.fixture
def vit(tmp_path: Path) -> tuple[VisionTransformer, Path]:
    model = VisionTransformer(**SIZES, num_classes=0).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "vit.pth")
    return model, tmp_path / "vit.pth"


def test_there_and_back_by_command(
    vit: tuple[VisionTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, path = vit
    out = tmp_path / "new" / "folder"
    assert main([str(path), str(out), "--to", "encoder", *HEADS]) == 0
    told = capsys.readouterr().out
    assert f"{path} (names of MAE, ConvMAE and timm), 24 px images" in told
    assert "online_encoder" in told
    assert main([str(out), str(tmp_path / "hf"), "--to", "huggingface"]) == 0
    assert main([str(tmp_path / "hf"), str(tmp_path / "timm"), "--to", "timm"]) == 0
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    for name, tensor in original.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(read_encoder(out)(images, None), original.forward_features(images))


def test_every_format_has_a_writer() -> None:
    assert all(callable(find_writer(to)) for to in FORMATS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.pth", "out", "--to", "encoder"], "error: nowhere.pth does not exist"),
        (["{vit}", "out", "--to", "encoder"], "say it with --num_heads N"),
        (["{vit}", "out", "--to", "huggingface_mae", *HEADS], "needs a pixel decoder"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_with_status_2(
    vit: tuple[VisionTransformer, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    line = [word.replace("{vit}", str(vit[1])).replace("out", str(tmp_path / "out")) for word in arguments]
    assert main(line) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert told in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["encoder", "timm", "cmae", "torch_export"])
def test_what_was_converted_before_is_replaced_only_when_asked(
    vit: tuple[VisionTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    out = tmp_path / ("out.pt2" if to == "torch_export" else "out")
    arguments = [str(vit[1]), str(out), "--to", to, *HEADS]
    assert main(arguments) == 0
    before = read_tree(out)
    assert main(arguments) == 2
    assert "is there already: write to another place, or give --overwrite" in capsys.readouterr().err
    assert read_tree(out) == before
    assert main([*arguments, "--overwrite"]) == 0
    if to != "torch_export":
        assert read_tree(out) == before


def test_another_format_leaves_nothing_of_the_older_one(
    vit: tuple[VisionTransformer, Path], tmp_path: Path
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    for to in ("huggingface", "timm"):
        assert main([str(vit[1]), str(out), "--to", to, "--overwrite", *HEADS]) == 0
    assert main([str(vit[1]), str(new), "--to", "timm", *HEADS]) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in new.iterdir()}


def read_tree(place: Path) -> dict[str, bytes]:
    paths = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "--overwrite"])
@pytest.mark.parametrize(
    ("source", "out", "to", "told"),
    [
        ("vit.pth", "vit.pth", "encoder", "is, or belongs to, what is read"),
        ("vit.pth", "vit.pth", "onnx", "write a name that ends in .onnx"),
        ("enc", "enc/in.onnx", "onnx", "is, or belongs to, what is read"),
        ("enc", "new", "torch_export", "write a name that ends in .pt2"),
        ("vit.pth", "", "encoder", "is, or belongs to, what is read"),
        ("enc", "enc", "timm", "is, or belongs to, what is read"),
        ("enc", "enc/../enc", "timm", "is, or belongs to, what is read"),
        ("enc", "link_to_enc", "timm", "is, or belongs to, what is read"),
        ("enc", "enc/model.safetensors", "torch_export", "write a name that ends in .pt2"),
        ("enc", "photos", "encoder", "holds what no conversion has written"),
        ("enc", "others", "encoder", "holds what no conversion has written"),
        ("enc", "mixed", "encoder", "holds what no conversion has written"),
        ("enc", "folder.onnx", "onnx", "is there already and is a folder"),
        ("enc", "notes.txt", "onnx", "write a name that ends in .onnx"),
        ("enc", "notes.txt", "timm", "is there already and is no folder"),
        ("enc", "notes.txt/new", "timm", "notes.txt is no folder"),
        ("enc", "notes.txt/new/newer.onnx", "onnx", "notes.txt is no folder"),
        ("enc", "dangling", "timm", "is a link to nothing"),
        ("enc", "dangling.onnx", "onnx", "is a link to nothing"),
    ],
)
def test_nothing_that_is_not_a_conversions_own_is_ever_touched(
    vit: tuple[VisionTransformer, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
    to: str,
    told: str,
    overwrite: list[str],
) -> None:
    assert main([str(vit[1]), str(tmp_path / "enc"), "--to", "encoder", *HEADS]) == 0
    others = tmp_path / "others"  # what somebody else has saved under the same names
    others.mkdir()
    save_file(vit[0].state_dict(), others / "model.safetensors", metadata={"format": "pt"})
    (others / "config.json").write_text("{}")
    shutil.copytree(tmp_path / "enc", tmp_path / "mixed")
    (tmp_path / "mixed" / "thesis.tex").write_text("mine")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "enc" / "in.onnx").write_text("mine")
    (tmp_path / "folder.onnx").mkdir()
    for name in ("dangling", "dangling.onnx"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    (tmp_path / "link_to_enc").symlink_to(tmp_path / "enc")
    before = read_tree(tmp_path)
    assert main([str(tmp_path / source), str(tmp_path / out), "--to", to, *HEADS, *overwrite]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert told in errors[0]
    assert read_tree(tmp_path) == before


def test_an_empty_folder_and_an_interrupted_conversion_are_written_to(
    vit: tuple[VisionTransformer, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.part").write_text("half")
    assert main([str(vit[1]), str(out), "--to", "timm", *HEADS]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_the_channels_of_official_weights_are_told(
    vit: tuple[VisionTransformer, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "patch_embed.proj": "patch_embed.projection",
        "blocks": "layers",
        "norm1": "ln1",
        "norm2": "ln2",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
    }
    state = {}
    for name, tensor in vit[0].state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name.replace("norm.", "ln1.")] = tensor
    torch.save({"state_dict": state}, tmp_path / "cmae.pth")
    arguments = [str(tmp_path / "cmae.pth"), str(tmp_path / "out"), "--to", "encoder", *HEADS]
    assert main(arguments) == 0
    assert "now take RGB" in capsys.readouterr().out
    assert main([*arguments, "--channels", "keep", "--overwrite"]) == 0
    assert "want BGR images" in capsys.readouterr().err
    kept = read_encoder(tmp_path / "out").state_dict()
    assert torch.equal(kept["patch_embed.proj.weight"], vit[0].patch_embed.proj.weight)


@pytest.mark.parametrize("way", ["by module", "by path"])
def test_help_has_examples_and_needs_no_torch(way: str, repository: Path) -> None:
    command = ["-m", "cmae_scale.convert"] if way == "by module" else ["cmae_scale/convert.py"]
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert all(name in done.stdout for name in FORMATS)
    code = "import sys, cmae_scale.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0
