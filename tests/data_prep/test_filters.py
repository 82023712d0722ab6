"""What is left out and why: small images, duplicates, broken pixels. Each is named in skipped.jsonl."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main
from data_prep.merge import find_duplicates
from data_prep.stats import ShardStats, pack_stats, read_quantiles, unpack_stats
from data_prep.writer import build_header


def picture(number: int, *, side: int = 9, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_images(root: Path, images: dict[str, bytes]) -> Path:
    for name, data in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def make(root: Path, out: Path, *options: str) -> int:
    argv = ["--source", "imagefolder", "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, "--samples_per_shard", "3", *options])


def read_images(folder: Path) -> list[bytes]:
    index = read_index(folder)
    return [
        sample.image
        for number, shard in enumerate(index.shards)
        for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
    ]


def read_skipped(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def test_each_image_is_kept_once_and_the_first_in_the_shuffled_order(tmp_path: Path) -> None:
    images = {f"{'ab'[number % 2]}/{number}.png": picture(number % 7) for number in range(20)}
    root = write_images(tmp_path / "images", images)
    assert make(root, tmp_path / "all") == 0
    assert make(root, tmp_path / "once", "--dedup") == 0
    whole, once = read_images(tmp_path / "all"), read_images(tmp_path / "once")
    assert once == list(dict.fromkeys(whole))
    assert len(once) == 7
    skipped = read_skipped(tmp_path / "once")
    assert len(skipped) == 13
    assert [each["position"] for each in skipped] == sorted(each["position"] for each in skipped)
    for each in skipped:
        kept = each["reason"].removeprefix("same content as ").split(",")[0]
        assert images[each["name"]] == images[kept]
        assert (each["kind"], "which has label" in each["reason"]) == (
            "duplicate",
            each["name"][0] != kept[0],
        )


def test_nothing_skipped_leaves_no_list(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {f"a/{number}.png": picture(number) for number in range(5)})
    assert make(root, tmp_path / "out", "--dedup", "--min_side_px", "9") == 0
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


def test_running_again_and_remaking_a_lost_shard_keep_the_list_and_the_bytes(tmp_path: Path) -> None:
    images = {f"a/{number}.png": picture(number % 11) for number in range(24)}
    root = write_images(tmp_path / "images", {**images, "a/bad.png": b"bad"})
    out = tmp_path / "out"
    options = ("--dedup", "--skip_bad")
    make(root, out, *options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert make(root, out, *options) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for shard in read_index(out).shards:
        (out / shard.name).unlink()
        assert make(root, out, *options) == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 3), st.integers(0, 3)), unique_by=lambda row: row[0]
    )
)
def test_duplicates_are_those_of_a_dictionary(rows: list[tuple[int, int, int]]) -> None:
    first: dict[tuple[int, int], int] = {}
    expected = set()
    for position, *digest in sorted(rows):
        kept = first.setdefault((digest[0], digest[1]), position)
        if kept != position:
            expected.add((position, kept))
    positions = np.array([row[0] for row in rows], dtype=np.int64)
    digests = np.array([row[1:] for row in rows], dtype=np.int64).reshape(-1, 2)
    assert set(find_duplicates(positions, digests)) == expected


def test_small_images_are_left_out_without_skip_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {"a/big.png": picture(1, side=8), "a/small.png": picture(2, side=7)}
    root = write_images(tmp_path / "images", images)
    assert make(root, tmp_path / "out", "--min_side_px", "8") == 0
    assert read_images(tmp_path / "out") == [images["a/big.png"]]
    (line,) = read_skipped(tmp_path / "out")
    assert (line["name"], line["kind"]) == ("a/small.png", "small")
    assert line["reason"] == "short side of 7 px, --min_side_px is 8"
    assert "skipped 1: 1 too small; skipped.jsonl names each" in capsys.readouterr().out


def test_cut_images_are_found_only_when_pixels_are_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = picture(1, side=64, form="JPEG")
    root = write_images(tmp_path / "images", {"a/1.jpg": whole, "a/2.jpg": whole[: len(whole) // 2]})
    assert make(root, tmp_path / "fast") == 0
    assert len(read_images(tmp_path / "fast")) == 2
    assert make(root, tmp_path / "sure", "--verify_pixels") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: a/2.jpg: cannot be decoded")
    assert make(root, tmp_path / "sure", "--verify_pixels", "--skip_bad") == 0
    assert read_images(tmp_path / "sure") == [whole]


def test_the_closing_lines_count_formats_sizes_and_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = {f"a/{side}.png": picture(side, side=side) for side in (8, 10, 30)}
    images |= {"a/1.jpg": picture(1, side=20, form="JPEG"), "a/2.jpg": b"bad", "a/3.png": picture(8, side=8)}
    root = write_images(tmp_path / "images", images)
    assert make(root, tmp_path / "out", "--skip_bad", "--dedup") == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "4 images, 1 classes, 2 shards" in lines[0]
    assert "images/s" in lines[0]
    assert "MB/s" in lines[0]
    assert lines[1].startswith("  png 3, jpg 1; short side 8 to 30 px, median 10; ")
    assert set(lines[2].split(": ")[1].split("; ")[0].split(", ")) == {"1 unreadable", "1 duplicates"}


def test_a_tally_survives_its_record_and_quantiles_are_those_of_the_list() -> None:
    stats = ShardStats()
    sides = [5, 5, 9, 1, 7]
    for side in sides:
        stats.count_image("jpg", size=10 * side, short_side=side)
    stats.skipped["bad"] += 2
    assert unpack_stats(json.loads(json.dumps(pack_stats(stats)))) == stats
    assert read_quantiles(stats.short_sides) == (1, 5, 9)
    assert read_quantiles({3: 1}) == (3, 3, 3)
    assert read_quantiles({3: 1, 4: 1}) == (3, 3, 4)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(size: int) -> None:
    for name in ("000000000.jpg", "9999999999.cls"):
        header = tarfile.TarInfo(name)
        header.size = size
        assert build_header(name, size) == header.tobuf(tarfile.USTAR_FORMAT)
