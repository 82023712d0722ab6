"""Holding out: both sets in one go, by content, the same images whatever is added."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main

COUNT = 240


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(root: Path, numbers: range, *, prefix: str = "") -> Path:
    for number in numbers:
        path = root / "abc"[number % 3] / f"{prefix}{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def make(root: Path, out: Path, *options: str, source: str = "imagefolder", fraction: str = "0.2") -> int:
    argv = ["--source", source, "--root", str(root), "--out", str(out), "--samples_per_shard", "16"]
    return run_command(main, [*argv, "--processes", "1", "--val_fraction", fraction, *options])


def read_labels(folder: Path) -> dict[bytes, int | None]:
    index = read_index(folder)
    return {
        sample.image: sample.label
        for number, shard in enumerate(index.shards)
        for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
    }


def contents(out: Path) -> dict[str, str]:
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_image_is_on_one_side_and_each_class_gives_its_part(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", range(COUNT))
    assert make(root, tmp_path / "out") == 0
    train, val = (read_labels(tmp_path / "out" / split) for split in ("train", "val"))
    assert len(train) + len(val) == len(train | val) == COUNT
    assert read_index(tmp_path / "out" / "val").classes == ("a", "b", "c")
    for label in range(3):
        share = sum(each == label for each in val.values()) / (COUNT / 3)
        assert 0.05 < share < 0.35, "0.2, and more than three standard deviations of 0.045"


def test_adding_and_renaming_images_moves_none(tmp_path: Path) -> None:
    assert make(fill(tmp_path / "in", range(COUNT)), tmp_path / "out") == 0
    more = fill(tmp_path / "more", range(COUNT + 60), prefix="renamed ")
    assert make(more, tmp_path / "grown") == 0
    for split in ("train", "val"):
        before, after = read_labels(tmp_path / "out" / split), read_labels(tmp_path / "grown" / split)
        assert before.keys() <= after.keys()


def test_images_that_are_appended_go_to_the_side_that_they_would_have_been_on(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", range(COUNT))
    assert make(root, tmp_path / "out") == 0
    before = {split: contents(tmp_path / "out" / split) for split in ("train", "val")}
    fill(root, range(COUNT, COUNT + 60))
    assert make(root, tmp_path / "out") == 2
    assert make(root, tmp_path / "out", "--append") == 0
    assert make(root, tmp_path / "fresh") == 0
    for split, old in before.items():
        after = contents(tmp_path / "out" / split)
        assert {name: old[name] for name in old if name.endswith(".tar")}.items() <= after.items()
        assert read_labels(tmp_path / "out" / split) == read_labels(tmp_path / "fresh" / split)


def test_a_larger_part_holds_the_smaller_and_equal_files_are_on_one_side(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", range(60))
    fill(root, range(60), prefix="again ")
    assert make(root, tmp_path / "few", fraction="0.1") == 0
    assert make(root, tmp_path / "many", fraction="0.4") == 0
    few, many = (read_labels(tmp_path / out / "val") for out in ("few", "many"))
    assert few.keys() < many.keys()
    assert not many.keys() & read_labels(tmp_path / "many" / "train").keys()


@pytest.mark.parametrize("options", [("--processes", "2"), ("--part", "1/1"), ()])
def test_the_same_bytes_however_it_is_run_and_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    root = fill(tmp_path / "in", range(90))
    assert make(root, tmp_path / "whole") == 0
    assert make(root, tmp_path / "out", *options) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    capsys.readouterr()
    assert make(root, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("all there already") == 2


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", range(60))
    assert make(root, tmp_path / "whole") == 0
    (tmp_path / "out" / ".scratch-1-of-1-x").mkdir(parents=True)
    (tmp_path / "out" / ".scratch-1-of-1-x" / "images").touch()
    (tmp_path / "out" / ".held_out-0.2-x.1234.part").touch()
    assert make(root, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".scratch-1-of-1-x").exists()


def test_parts_read_all_images_once_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "in", range(60))
    assert make(root, tmp_path / "whole") == 0
    assert make(root, tmp_path / "out", "--part", "2/2") == 0
    monkeypatch.setattr("data_prep.held_out._find_held_out", lambda *_, **__: pytest.fail("read again"))
    assert make(root, tmp_path / "out", "--part", "1/2") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parquet_and_tables_are_divided_as_their_files_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = fill(tmp_path / "in", range(60))
    numbers = range(60)
    table = pyarrow.table({"image": [picture(n) for n in numbers], "label": ["abc"[n % 3] for n in numbers]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    lines = [f"{'abc'[n % 3]}/{n}.png,{'abc'[n % 3]}" for n in numbers]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]))
    assert make(root, tmp_path / "folder") == 0
    assert make(tmp_path / "a.parquet", tmp_path / "table", source="huggingface") == 0
    assert make(root / "list.csv", tmp_path / "csv", source="csv") == 0
    for split in ("train", "val"):
        expected = read_labels(tmp_path / "folder" / split)
        assert read_labels(tmp_path / "table" / split) == read_labels(tmp_path / "csv" / split) == expected
    assert not list((tmp_path / "table").glob(".scratch*"))


def test_a_test_set_stays_and_a_val_set_is_not_divided_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in" / "train", range(60))
    fill(tmp_path / "in" / "test", range(60, 66))
    assert make(tmp_path / "in", tmp_path / "out") == 0
    totals = {split: read_index(tmp_path / "out" / split).total for split in ("train", "val", "test")}
    assert totals["train"] + totals["val"] == 60
    assert totals["test"] == 6
    fill(tmp_path / "in" / "validation", range(60, 66))
    assert make(tmp_path / "in", tmp_path / "other") == 2
    assert "has splits already (test, train, validation): leave out --val_fraction" in capsys.readouterr().err


def test_a_bad_file_stays_in_train_and_is_told_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fill(tmp_path / "in", range(30))
    (root / "a" / "gone.png").symlink_to("nowhere")
    assert make(root, tmp_path / "out") == 2
    assert "a/gone.png: cannot be read" in capsys.readouterr().err
    assert make(root, tmp_path / "out", "--skip_bad") == 0


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path / "in", range(3))
    assert make(root, tmp_path / "out", fraction="0.000001") == 2
    assert "leaves no image for one side" in capsys.readouterr().err
    assert make(root, tmp_path / "out", "--dry_run") == 2
    assert "leave out one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make(root, tmp_path / "out", fraction="5")
    assert "must lie between 0 and 1" in capsys.readouterr().err
    assert make(fill(root, range(30)), tmp_path / "out") == 0
    assert make(root, tmp_path / "out", fraction="0.3") == 2
    assert "was begun with val_fraction 0.2 (now 0.3)" in capsys.readouterr().err
