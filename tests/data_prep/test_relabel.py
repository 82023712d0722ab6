"""Class names of other shards, no labels at all, and names that are not UTF-8."""

import os
from pathlib import Path

import pytest

from cmae_scale.core.errors import DataError
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from tests.data_prep.images import fill, make, picture


def read_labels(folder: Path) -> list[int | None]:
    index = read_index(folder)
    return sorted(
        (
            sample.label
            for number, shard in enumerate(index.shards)
            for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
        ),
        key=lambda label: -1 if label is None else label,
    )


def test_a_val_set_that_lacks_a_class_is_numbered_as_the_train_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = fill(tmp_path / "train", "cat/1.png", "dog/2.png", "emu/3.png")
    val = fill(tmp_path / "val", "dog/4.png", "emu/5.png")
    assert make("imagefolder", train, tmp_path / "out" / "train") == 0
    assert (
        make("imagefolder", val, tmp_path / "out" / "val", "--classes", str(tmp_path / "out" / "train")) == 0
    )
    assert read_index(tmp_path / "out" / "val").classes == ("cat", "dog", "emu")
    assert read_labels(tmp_path / "out" / "val") == [1, 2]
    assert "1 of 3 classes have no image: cat" in capsys.readouterr().err


def test_shards_with_other_classes_say_which_and_what_to_do(tmp_path: Path) -> None:
    from cmae_scale.config.cmae import DataConfig
    from cmae_scale.data.shard_set import open_labelled, open_shards

    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    assert make("imagefolder", fill(tmp_path / "1", "cat/1.png", "dog/2.png"), Path(train)) == 0
    assert make("imagefolder", fill(tmp_path / "2", "dog/3.png", "gnu/4.png"), Path(val)) == 0
    data = DataConfig(shards=train)
    with pytest.raises(
        DataError, match=r"it lacks 'cat', and has 'gnu' besides\): make it again with --classes"
    ):
        open_labelled(train, val, data=data)
    with pytest.raises(
        DataError, match=r"it lacks 'cat', and has 'gnu' besides\): they cannot be one data set"
    ):
        open_shards((train, val), data=data)


@pytest.mark.parametrize("extra", ["gnu", "Dog"])
def test_a_class_that_the_other_shards_lack_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str
) -> None:
    assert make("imagefolder", fill(tmp_path / "in", "cat/1.png", "dog/2.png"), tmp_path / "train") == 0
    val = fill(tmp_path / "val", "cat/3.png", f"{extra}/4.png")
    (val / "empty").mkdir()
    capsys.readouterr()
    assert make("imagefolder", val, tmp_path / "out", "--classes", str(tmp_path / "train")) == 2
    error = capsys.readouterr().err
    assert f"has the class '{extra}', which is none of the 2 of {tmp_path / 'train'}" in error
    assert ("did you mean 'dog'" in error) == (extra == "Dog")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--no_labels",), ("--no_labels", "--processes", "2")])
def test_without_labels_nothing_about_them_can_be_wrong(tmp_path: Path, options: tuple[str, ...]) -> None:
    root = fill(tmp_path / "in", "a/1.png", "b/2.png")
    (root / "b").rename(os.fsdecode(os.fsencode(root) + b"/caf\xe9"))
    (root / "list.csv").write_bytes(b"path,label\na/1.png,caf\xe9\n")
    for source, where in (("imagefolder", root), ("csv", root / "list.csv")):
        assert make(source, where, tmp_path / source, *options) == 0
        assert read_index(tmp_path / source).classes == ()
        assert set(read_labels(tmp_path / source)) == {None}


def test_labels_that_are_lists_are_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"image": [picture(1)], "labels": [[1, 2]]}), tmp_path / "a.parquet")
    assert make("huggingface", tmp_path / "a.parquet", tmp_path / "out") == 2
    assert "column 'labels' holds lists, not one class an image" in capsys.readouterr().err
    assert make("huggingface", tmp_path / "a.parquet", tmp_path / "out", "--no_labels") == 0
    assert read_labels(tmp_path / "out") == [None]


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "shift_jis"])
def test_folders_from_an_old_archive_need_their_encoding_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    name = {"cp1252": "café", "cp437": "bär", "shift_jis": "犬"}[encoding]
    root = fill(tmp_path / "in", "a/1.png", "b/2.png")
    (root / "b").rename(root / os.fsdecode(name.encode(encoding)))
    assert make("imagefolder", root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "is not UTF-8: name its encoding" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert make("imagefolder", root, tmp_path / "out", "--encoding", encoding) == 0
    assert read_index(tmp_path / "out").classes == ("a", name)


def test_a_root_that_is_not_utf8_is_no_hindrance(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    fill(root, "a/1.png", "b/2.png")
    assert make("imagefolder", root, tmp_path / "out") == 0
    assert read_index(tmp_path / "out").source == rf"imagefolder {tmp_path}/caf\xe9"


def test_options_that_contradict_each_other_and_encodings_that_are_none_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("flat", tmp_path, tmp_path / "out", "--no_labels", "--classes", "x") == 2
    assert "--no_labels leaves out what --classes" in capsys.readouterr().err
    for name in ("cp12", "base64"):
        with pytest.raises(SystemExit):
            make("flat", tmp_path, tmp_path / "out", "--encoding", name)
        assert f"'{name}' is no encoding" in capsys.readouterr().err
