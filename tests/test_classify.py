"""The command that judges single images."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from cmae_scale.classify import main
from cmae_scale.convert import main as convert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/model with three classes."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}
    torch.save(VisionTransformer(**sizes, num_classes=3).state_dict(), folder / "vit.pth")
    arguments = [str(folder / "vit.pth"), str(folder / "model"), "--to", "timm", "--num_heads", "3"]
    assert convert(arguments) == 0
    return folder / "model"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.JPG", "deep/c.bmp", "deep/er/d.tif"]):
        Image.new("RGB", (30, 20), (80 * number, 9, 9)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    for hidden in (".thumbnails/a.png", "__MACOSX/a.jpg", ".DS_Store.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    return folder


def judge(model: Path, *images: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[Any], list[str]]:
    """Exit status, JSON lines, and lines on stderr."""
    capsys.readouterr()
    status = main(["--model", str(model), "--json", *map(str, images)])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err.splitlines()


def test_a_folder_is_searched_for_images_in_order(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, lines, errors = judge(model, photos, capsys=capsys)
    assert (status, errors) == (0, [])
    names = ["a.JPG", "b.png", "deep/c.bmp", "deep/er/d.tif"]
    assert [line["image"] for line in lines] == [str(photos / name) for name in names]
    assert all(sum(line["guesses"].values()) == pytest.approx(1) for line in lines)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 cut", None])
def test_a_bad_image_keeps_no_other_from_being_judged(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    bad = photos / "bad.jpg"
    if content is not None:
        bad.write_bytes(content)
    status, lines, errors = judge(model, photos / "a.JPG", bad, photos / "b.png", capsys=capsys)
    assert status == 2
    assert ["guesses" in line for line in lines] == [True, False, True]
    assert lines[1]["image"] == str(bad)
    assert errors[0] == f"error: {bad}: {lines[1]['error']}"
    assert errors[1:] == ["error: 1 of 3 images could not be classified"]


def test_a_list_on_standard_input_may_name_files_and_folders(
    model: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = photos / "caf\udce9.png"  # é in latin-1, as old zip files leave it
    odd.write_bytes((photos / "b.png").read_bytes())
    listed = b"\n".join(
        [bytes(photos / "a.JPG"), b"", bytes(odd) + b"\r", bytes(photos / "deep"), b"nowhere.png"]
    )
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    status, lines, errors = judge(model, "-", capsys=capsys)
    assert status == 2
    assert [Path(line["image"]).name for line in lines] == [
        "a.JPG",
        "caf\\xe9.png",
        "c.bmp",
        "d.tif",
        "nowhere.png",
    ]
    assert errors[0] == "error: nowhere.png: it cannot be read: No such file or directory"


def test_a_folder_without_images_and_an_empty_list_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, lines, errors = judge(model, tmp_path, capsys=capsys)
    assert (status, len(lines)) == (2, 1)
    assert "the folder holds no image" in errors[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert judge(model, "-", capsys=capsys) == (2, [], ["error: no image was named"])


def test_a_run_is_as_good_as_its_model(model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_run = judge(model.parent, photos, capsys=capsys)
    assert of_run == judge(model, photos, capsys=capsys)


@pytest.mark.parametrize("top", ["0", "-1", "many"])
def test_at_least_one_guess_must_be_asked_for(top: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "m", "--top", top, "a.jpg"]) == 2
    assert f'"{top}" is no count' in capsys.readouterr().err
