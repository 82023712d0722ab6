"""Tars beside an index, and tars without one."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.shard_set import open_shards
from data_prep.check_shards import main
from data_prep.make_shards import main as make_shards


def picture(number: int, *, deep: bool = False) -> bytes:
    values = np.random.default_rng(number).integers(100, 3000, (9, 12))
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16 if deep else np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for number, label in enumerate(("cat", "dog", "cat")):
        (tmp_path / "in" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / label / f"{number}.png").write_bytes(picture(number))
    argv = ["--source", "imagefolder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert run_command(make_shards, [*argv, "--processes", "1", "--samples_per_shard", "2"]) == 0
    return tmp_path / "out"


def read_labels(folder: Path) -> list[int | None]:
    shards = open_shards(str(folder), data=DataConfig(shards=str(folder)))
    return [sample.label for shard in shards.shards for sample in shard.read(0, shard.info.samples)]


def test_a_tar_beside_an_index_is_told_and_taken_up_with_the_names_of_classes(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_index(made)
    write_tar(made / "extra.tar", ("a.png", picture(7)), ("a.cls", b"1"))
    assert run_command(main, [str(made)]) == 2
    told = capsys.readouterr()
    assert f"{made / 'extra.tar'}: index.json does not list it, so it is not read" in told.out
    assert "1 tars are not in an index: --write_index takes them up" in told.err
    assert run_command(main, ["--write_index", str(made)]) == 0
    index = read_index(made)
    assert (index.classes, index.total, index.shards[:2]) == (("cat", "dog"), 4, before.shards)
    assert len(read_labels(made)) == 4
    assert run_command(main, [str(made)]) == 0


@pytest.mark.parametrize("label", [b"2", b"1000000000"])
def test_a_tar_with_a_label_that_no_class_has_is_not_taken_up(
    made: Path, label: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    index = (made / "index.json").read_bytes()
    write_tar(made / "extra.tar", ("a.png", picture(7)), ("a.cls", label))
    assert run_command(main, ["--write_index", str(made)]) == 2
    assert f"the label of sample 'a', {label.decode()}, is not below 2" in capsys.readouterr().err
    assert (made / "index.json").read_bytes() == index


def test_a_lost_index_comes_back_with_the_names_of_its_classes(made: Path) -> None:
    before = read_index(made)
    (made / "index.json").unlink()
    assert run_command(main, ["--write_index", str(made)]) == 0
    assert read_index(made).classes == ("cat", "dog")
    assert read_index(made).shards == before.shards


def test_names_of_classes_that_are_damaged_are_told(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "index.json").unlink()
    (made / "classes.json").write_text('{"a": 1}')
    assert run_command(main, ["--write_index", str(made)]) == 2
    assert "is no list of class names" in capsys.readouterr().err


def test_a_folder_that_is_being_made_is_not_listed(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / ".making.json").write_text("{}")
    assert run_command(main, ["--write_index", str(made)]) == 2
    assert "is not finished: run its make_shards command to the end first" in capsys.readouterr().err


@pytest.mark.parametrize("label", [b"1000000000", b"999999999", b"70000"])
def test_ids_in_tars_without_an_index_are_one_sentence(
    tmp_path: Path, label: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "in" / "a.tar", ("a.png", picture(7)), ("a.cls", label))
    assert run_command(main, ["--write_index", str(tmp_path / "in")]) == 2
    error = capsys.readouterr().err
    assert "pack the tars with make_shards --source webdataset, which numbers labels anew" in error
    assert error.count("\n") == 1


def test_names_with_dots_are_listed_and_read_by_their_stems(tmp_path: Path) -> None:
    members = [(f"cam.{number:03d}.png", picture(number)) for number in range(8)]
    labels = [(f"cam.{number:03d}.cls", b"%d" % number) for number in range(8)]
    write_tar(tmp_path / "a.tar", *(member for pair in zip(members, labels, strict=True) for member in pair))
    write_tar(tmp_path / "b.tar", ("x.png", picture(9)), ("x.cls", b"0"))
    assert run_command(main, ["--write_index", str(tmp_path)]) == 0
    assert read_index(tmp_path).options == {"keys": "stem"}
    assert read_labels(tmp_path) == [*range(8), 0]
    shards = open_shards(str(tmp_path), data=DataConfig(shards=str(tmp_path)))
    assert [sample.key for sample in shards.shards[0].read(3, 2)] == ["cam.003", "cam.004"]


def test_names_whose_dots_mean_different_things_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", ("cam.1.png", picture(1)), ("cam.2.png", picture(2)))
    write_tar(tmp_path / "b.tar", ("x.png", picture(3)), ("x.mask.png", picture(4)))
    assert run_command(main, ["--write_index", str(tmp_path)]) == 2
    assert "b.tar: dots in names mean parts of a sample, and in a.tar they do not" in capsys.readouterr().err


def test_the_range_of_deep_grey_is_noted_for_tars_made_elsewhere(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("a.png", picture(1, deep=True)), ("b.png", picture(2)))
    assert run_command(main, ["--write_index", str(tmp_path)]) == 0
    with Image.open(io.BytesIO(picture(1, deep=True))) as image:
        assert read_index(tmp_path).options["value_range"] == list(map(float, image.getextrema()))


def test_an_index_of_before_is_written_as_before(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("a.png", picture(1)), ("a.cls", b"2"))
    assert run_command(main, ["--write_index", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "index.json").read_text())
    assert content["classes"] == ["0", "1", "2"]
    assert (content["options"], content["source"], content["total"]) == ({}, "tars made elsewhere", 1)
