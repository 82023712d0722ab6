"""Every file that was found is in the shards, or told: in the closing lines, by name in skipped.jsonl."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from data_prep.make_shards import main
from tests.data_prep.images import fill, picture


def make(root: Path, out: Path, *options: str, source: str = "imagefolder") -> int:
    argv = ["--source", source, "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, "--samples_per_shard", "3", *options])


def read_unlisted(out: Path) -> dict[str, str]:
    if not (out / "skipped.jsonl").exists():
        return {}
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    return {line["name"]: line["reason"] for line in lines if line["kind"] == "unlisted"}


def test_files_that_are_not_taken_are_told_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a/1.png", "a/notes.txt", "a/x/2.TXT", "b/raw", "b/3.png", "4.png", ".git/5.png", "a/._1.png")
    root = fill(tmp_path / "in", *names, "Thumbs.db", "__MACOSX/6.png", "b/.DS_Store")
    assert make(root, tmp_path / "out") == 0
    assert read_index(tmp_path / "out").classes == ("a", "b")
    assert read_unlisted(tmp_path / "out") == {
        "a/notes.txt": "no image by name (.txt)",
        "a/x/2.TXT": "no image by name (.txt)",
        "b/raw": "no image by name (without an ending)",
        "4.png": "beside the class folders: of no class",
        ".git/": "hidden",
        "a/._1.png": "left by an operating system",
        "Thumbs.db": "left by an operating system",
        "__MACOSX/": "left by an operating system",
        "b/.DS_Store": "left by an operating system",
    }
    line = capsys.readouterr().out.splitlines()[-1]
    assert "not listed 9: 4 left by an operating system, 2 no image by name (.txt), 1 " in line


def test_what_was_not_listed_stays_told_when_a_shard_is_made_again(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", *(f"a/{number}.png" for number in range(7)), "a/notes.txt")
    (root / "a" / "bad.png").write_bytes(b"bad")
    out = tmp_path / "out"
    assert make(root, out, "--skip_bad", "--dedup") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(before["skipped.jsonl"].splitlines()) == 2
    for shard in read_index(out).shards:
        (out / shard.name).unlink()
        assert make(root, out, "--skip_bad", "--dedup") == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_class_without_an_image_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = fill(tmp_path / "in", "a/1.png", "b/scan.dcm", "c/2.png")
    assert make(root, tmp_path / "out") == 0
    assert "warning: " in (error := capsys.readouterr().err)
    assert "1 of 3 classes have no image: b" in error
    assert read_index(tmp_path / "out").classes == ("a", "b", "c")


def test_files_beside_parquet_files_are_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in" / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"image": [picture(1)]}), tmp_path / "in" / "data" / "a.parquet")
    fill(tmp_path / "in", "README.md", "data/list.csv", "images/1.png", ".gitattributes")
    assert make(tmp_path / "in", tmp_path / "out", source="huggingface") == 0
    beside = "beside the files of the data set"
    told = dict.fromkeys(("README.md", "data/list.csv", "images/"), beside)
    assert read_unlisted(tmp_path / "out") == {**told, ".gitattributes": "hidden"}
    assert make(tmp_path / "in" / "data" / "a.parquet", tmp_path / "one", source="huggingface") == 0
    assert read_unlisted(tmp_path / "one") == {}, "one file was named, the others were not found"


def test_endings_without_number_do_not_become_reasons_without_number(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1.png", *(f"slice.{number}" for number in range(50)), "x.dcm", "y.2024-01-01")
    assert make(tmp_path / "in", tmp_path / "out", source="flat") == 0
    assert Counter(read_unlisted(tmp_path / "out").values()) == {
        "no image by name (without an ending)": 51,
        "no image by name (.dcm)": 1,
    }


def test_a_pipe_among_the_images_is_left_out_instead_of_waited_for(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", "cat/0.png", "dog/1.png")
    os.mkfifo(root / "dog" / "pipe.png")
    assert make(root, tmp_path / "shards") == 2
    assert make(root, tmp_path / "shards", "--skip_bad") == 0
    (line,) = (tmp_path / "shards" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "is a pipe, a device or a folder: no image"


def test_a_single_class_is_doubted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An archive unpacked into a folder of its own name puts all classes into one."""
    root = fill(tmp_path / "in", "animals/cat/1.png", "animals/dog/2.png")
    assert make(root, tmp_path / "out") == 0
    assert (
        "all images are of one class, animals: if its folder holds the classes, name it"
        in capsys.readouterr().err
    )


NAMES = st.sampled_from(["a", "b", ".a", "thumbs.db", "x.png", "x.txt", "y.JPG", "_.jpeg", "._x.png", "z"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.lists(NAMES, min_size=1, max_size=3).map("/".join), min_size=1, max_size=8))
def test_no_file_of_any_folder_vanishes(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    names |= {"a/first.png"}
    files = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    tmp_path = tmp_path_factory.mktemp("case")
    root = fill(tmp_path / "in", *files)
    for source in ("imagefolder", "flat"):
        out = tmp_path / source
        assert make(root, out, source=source) == 0
        told = read_unlisted(out)
        folders = tuple(name for name in told if name.endswith("/"))
        hidden = [name for name in files if name.startswith(folders) and folders]
        assert read_index(out).total == len(files) - len(hidden) - (len(told) - len(folders))
        assert set(told) <= files | set(folders)
        assert not Counter(told.values())[""]
