"""Grey of 16 and 32 bits: one range for a set, found or given, told, and used by whoever decodes."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmae_scale.config.cmae import DataConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import decode_image
from cmae_scale.data.decoding import BadSamples, CentreCrops
from cmae_scale.data.index import read_index
from cmae_scale.data.ordered import open_ordered
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main

SIDE = 32


def ramp(low: float, high: float, *, dtype: str = "uint16", form: str = "PNG", side: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(low, high, side * side).reshape(side, side).astype(dtype)).save(file, form)
    return file.getvalue()


def make(root: Path, out: Path, *options: str) -> int:
    argv = ["--source", "flat", "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, "--samples_per_shard", "2", *options])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two dark scans and a bright one, and a plain image beside them."""
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.png").write_bytes(ramp(200, 1000))
    (folder / "b.png").write_bytes(ramp(200, 1000))
    (folder / "c.tif").write_bytes(ramp(1000, 3000, form="TIFF"))
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(folder / "d.png")
    return folder


def decode_all(folder: Path) -> list[tuple[int, int]]:
    """The darkest and the brightest value of each image, as training decodes it, sorted."""
    data = DataConfig(shards=str(folder), workers=1)
    shards = open_shards(str(folder), data=data)
    crop = CropConfig(img_px=SIDE, centre=1.0)
    with open_ordered(
        shards, decoding=CentreCrops(crop, 50.0), data=data, batch=2, bad=BadSamples(1.0)
    ) as stream:
        images = torch.cat([batch.images for batch in stream])
    return sorted((int(image.min()), int(image.max())) for image in images)


def test_the_range_of_a_set_is_found_told_and_used(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(scans, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "deep grey: 200 is read as black, 3000 as white (see --value_range)" in out
    assert "3 of grey deeper than 8 bits" in out
    assert read_index(tmp_path / "out").options["value_range"] == [200, 3000]
    dark, bright = (0, round(800 / 2800 * 255)), (round(800 / 2800 * 255), 255)
    assert decode_all(tmp_path / "out") == sorted([dark, dark, bright, (9, 9)])
    assert make(scans, tmp_path / "out") == 0  # again: nothing to do
    assert read_index(tmp_path / "out").options["value_range"] == [200, 3000]


def test_a_lost_shard_is_made_again_and_the_range_stays(scans: Path, tmp_path: Path) -> None:
    assert make(scans, tmp_path / "out") == 0
    index = (tmp_path / "out" / "index.json").read_bytes()
    (tmp_path / "out" / "shard-00001.tar").unlink()
    assert make(scans, tmp_path / "out") == 0
    assert (tmp_path / "out" / "index.json").read_bytes() == index


def test_a_range_that_is_given_is_kept_and_used(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(scans, tmp_path / "out", "--value_range", "0", "4000") == 0
    assert "0 is read as black, 4000 as white" in capsys.readouterr().out
    assert decode_all(tmp_path / "out")[1] == (round(200 / 4000 * 255), round(1000 / 4000 * 255))
    assert make(scans, tmp_path / "out", "--value_range", "0", "100") == 2
    assert "value_range" in capsys.readouterr().err


@pytest.mark.parametrize("values", [("5", "5"), ("9", "1"), ("nan", "1"), ("0", "inf")])
def test_a_range_that_is_none_is_refused(
    scans: Path, tmp_path: Path, values: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(scans, tmp_path / "out", "--value_range", *values) == 2
    assert "must be two numbers, the smaller one first" in capsys.readouterr().err


def test_a_set_without_deep_grey_says_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("L", (SIDE, SIDE), 9).save(tmp_path / "in" / "a.png")
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert "value_range" not in read_index(tmp_path / "out").options


@pytest.mark.parametrize(
    ("dtype", "form", "low", "high", "ending"),
    [
        ("uint16", "PNG", 209, 2999, "png"),
        ("int32", "TIFF", -5000, 90_000, "tif"),
        ("float32", "TIFF", 0, 1, "tif"),
    ],
)
def test_deep_grey_that_is_made_smaller_stays_deep(
    tmp_path: Path, dtype: str, form: str, low: float, high: float, ending: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(ramp(low, high, dtype=dtype, form=form, side=64))
    assert make(tmp_path / "in", tmp_path / "out", "--resize_short", "32") == 0
    index = read_index(tmp_path / "out")
    assert index.options["value_range"] == [low, high]
    [sample] = read_samples(index.path(0), first=0, count=1, expected=index.shards[0])
    decoded = np.asarray(decode_image(sample.image, max_mpx=1.0, grey_range=(low, high)))
    assert decoded.shape == (32, 32, 3)
    assert len(np.unique(decoded)) > 100


def png_of_16_bits(*, colour: int, channels: int) -> bytes:
    """A PNG of SIDE x SIDE px, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(2 * channels * SIDE)) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_is_not_used_of_an_image_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    red, blue = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (SIDE, SIDE), "blue")
    red.convert("RGBX").save(folder / "near_infrared.tif")
    red.convert("RGBA").save(folder / "alpha.tif")
    for name in ("pages.tif", "moves.gif"):
        red.save(folder / name, save_all=True, append_images=[blue])
    (folder / "deep_colour.png").write_bytes(png_of_16_bits(colour=2, channels=3))
    (folder / "deep_with_alpha.png").write_bytes(png_of_16_bits(colour=4, channels=2))
    assert make(folder, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "2 of more than 8 bits in colour or with transparency (the upper 8 are used)" in out
    assert "1 with more bands than are used" in out
    assert "2 with several pictures (the first is used)" in out


def test_an_index_with_a_range_that_is_none_is_refused(scans: Path, tmp_path: Path) -> None:
    assert make(scans, tmp_path / "out") == 0
    path = tmp_path / "out" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"options": {"value_range": ["a", 1]}}))
    with pytest.raises(DataError, match=r"options\.value_range is not two numbers"):
        decode_all(tmp_path / "out")


def test_splits_of_one_command_are_read_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, low, high in (("train", 200, 1000), ("val", 100, 900)):
        (tmp_path / "in" / split).mkdir(parents=True)
        (tmp_path / "in" / split / "a.png").write_bytes(ramp(low, high))
    for _ in range(2):
        assert make(tmp_path / "in", tmp_path / "out") == 0
        for split in ("train", "val"):
            assert read_index(tmp_path / "out" / split).options["value_range"] == [100, 1000]
    assert capsys.readouterr().out.count("deep grey of all splits: 100 is read as black, 1000 as white") == 1
