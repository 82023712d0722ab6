"""Re-sharding what others made: strict about headers, careful with content, never a pickle."""

import io
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import DataError
from cmae_scale.data.index import read_index
from data_prep.make_shards import main
from data_prep.sources import SOURCES, Source, SourceRequest
from data_prep.sources.sample_tars import NO_IMAGE, _Tars
from tests.data_prep.images import picture, read_all

Member = tuple[str, bytes]


def write_tar(path: Path, members: Sequence[Member]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def list_webdataset(root: Path) -> Source:
    return SOURCES["webdataset"](SourceRequest(root))[""]


def make(root: Path, out: Path, *options: str) -> int:
    argv = ["--source", "webdataset", "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, "--samples_per_shard", "4", *options])


def test_what_the_stock_package_wrote_is_read_back(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in range(5):
                row = 5 * shard + number
                sample = {"__key__": f"folder/{row}", "png": picture(row), "cls": row % 3, "json": {"a": row}}
                tar.write(sample)
    source = list_webdataset(tmp_path)
    assert source.classes == ("0", "1", "2")
    assert [(source.read(item), item.label) for item in source.items] == [
        (picture(row), row % 3) for row in range(10)
    ]


def test_shards_of_ours_are_made_again_with_another_size_and_order(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number in range(10):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (root / "ab"[number % 2] / f"{number}.png").write_bytes(picture(number))
    argv = ["--source", "imagefolder", "--root", str(root), "--out", str(tmp_path / "first")]
    assert run_command(main, [*argv, "--samples_per_shard", "3", "--processes", "1"]) == 0
    assert make(tmp_path / "first", tmp_path / "second", "--seed", "5") == 0
    first, second = read_all(tmp_path / "first"), read_all(tmp_path / "second")
    assert read_index(tmp_path / "second").classes == ("a", "b")
    assert {(sample.image, sample.label) for sample in first} == {
        (sample.image, sample.label) for sample in second
    }
    assert [sample.image for sample in first] != [sample.image for sample in second]
    assert [sample.key for sample in second] == [f"{row:09d}" for row in range(10)]


class Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("was_run"),))


def test_nothing_is_unpickled_and_no_name_becomes_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    hostile = pickle.dumps(Payload())
    members = [
        *((f"1.{ending}", hostile) for ending in ("pkl", "pickle", "pyd", "pth", "pkl.gz", "npy")),
        ("1.png", picture(1)),
        ("../../escaped.png", picture(2)),
        ("/etc/3.png", picture(3)),
    ]
    write_tar(tmp_path / "in" / "hostile.tar", members)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert {sample.image for sample in read_all(tmp_path / "out")} == {
        picture(number) for number in (1, 2, 3)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="link or a device"):
        list_webdataset(tmp_path)


FAULTS: dict[str, list[Member]] = {
    "sample has no image": [("a.cls", b"1")],
    "sample has two images": [("a.png", b""), ("a.jpg", b"")],
    "sample has a label that is not a class number": [("a.png", picture(9)), ("a.cls", b"dog")],
    "it is a PDF document": [("a.png", b"%PDF-1.7")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sample_stops_by_its_name_or_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    (tmp_path / "in").mkdir()
    good = [("0.png", picture(0)), ("0.cls", b"3"), ("README.txt", b"x")]
    write_tar(tmp_path / "in" / "x.tar", [*good, *FAULTS[fault]])
    assert make(tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"error: x.tar/a: {fault}")
    assert make(tmp_path / "in", tmp_path / "out", "--skip_bad") == 0
    assert [(sample.image, sample.label) for sample in read_all(tmp_path / "out")] == [(picture(0), 3)]


def test_every_cut_of_a_foreign_tar_is_an_error(tmp_path: Path) -> None:
    """Without an index a cut can be seen by the missing end alone: tars end with zeros up to 10,240 bytes."""
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{number}.png", picture(number)) for number in range(4)])
    whole = path.read_bytes()
    end = max(place for place in range(len(whole)) if whole[place]) // 512 * 512 + 2 * 512
    for size in {*range(0, end, 512), *range(100, end, 333)}:
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="is damaged"):
            list_webdataset(tmp_path)


def test_a_tar_that_its_index_contradicts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", [(f"{number}.png", picture(number)) for number in range(6)])
    assert make(tmp_path / "in", tmp_path / "out") == 0
    shard = tmp_path / "out" / "shard-00000.tar"
    size = shard.stat().st_size
    write_tar(shard, [("1.png", picture(1))])
    shard.write_bytes(shard.read_bytes().ljust(size, b"\0"))
    with pytest.raises(DataError, match=r"holds 1 samples, its index\.json says 4"):
        list_webdataset(tmp_path / "out")


def test_samples_without_labels_are_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.png", picture(1)), ("2.png", picture(2))])
    assert "no labels: the samples have no .cls member" in list_webdataset(tmp_path).notes[0]


def test_a_pattern_chooses_among_tars(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", [("1.png", name.encode())])
    source = list_webdataset(tmp_path / "train-*.tar")
    assert [source.read(item) for item in source.items] == [b"train-0", b"train-1"]
    assert len(list_webdataset(tmp_path / "val-0.tar").items) == 1


def label_names(folder: Path) -> dict[bytes, str | None]:
    """The class of each image of a folder, by name."""
    classes = read_index(folder).classes
    return {
        sample.image: None if sample.label is None else classes[sample.label] for sample in read_all(folder)
    }


def test_names_with_dots_are_samples_of_their_own_and_none_is_lost(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [f"cam.{number:03d}" for number in range(8)] + [f"plain{number}" for number in range(8)]
    members = [
        member
        for number, name in enumerate(names)
        for member in ((f"{name}.png", picture(number)), (f"{name}.cls", b"%d" % (number % 3)))
    ]
    write_tar(tmp_path / "in" / "x.tar", members)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert label_names(tmp_path / "out") == {picture(number): str(number % 3) for number in range(16)}


@pytest.mark.parametrize("ids", [[10**9, 7], [999_999_999], [2**63 - 1, 5], [70_000, 3, 10**6]])
def test_sparse_ids_are_classes_by_name_and_no_others(tmp_path: Path, ids: list[int]) -> None:
    (tmp_path / "in").mkdir()
    members = [
        member
        for number, label in enumerate(ids)
        for member in ((f"{number}.png", picture(number)), (f"{number}.cls", b"%d" % label))
    ]
    write_tar(tmp_path / "in" / "x.tar", members)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert read_index(tmp_path / "out").classes == tuple(str(label) for label in sorted(ids))
    assert label_names(tmp_path / "out") == {picture(n): str(label) for n, label in enumerate(ids)}


@pytest.mark.parametrize("text", [str(2**63).encode(), b"9" * 5000, b"-7", b"1e9", b"dog"])
def test_an_absurd_label_is_one_sentence_or_left_out_with_all_labels(
    tmp_path: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", [("a.png", picture(0)), ("a.cls", text)])
    assert make(tmp_path / "in", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "sample has a label that is not a class number (--no_labels takes" in error
    assert error.count("\n") == 1
    assert make(tmp_path / "in", tmp_path / "other", "--no_labels") == 0
    assert label_names(tmp_path / "other") == {picture(0): None}


def test_folders_in_tars_are_the_classes_where_no_label_says_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    names = ["data/cat/1.png", "data/dog/2.png", "data/cat/3.png"]
    write_tar(tmp_path / "in" / "x.tar", [(name, picture(n)) for n, name in enumerate(names)])
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert "labels: the folders in the tars, 2 classes" in capsys.readouterr().out
    assert label_names(tmp_path / "out") == {picture(0): "cat", picture(1): "dog", picture(2): "cat"}


@pytest.mark.parametrize("folders", [["one", "one"], ["train", "val"], ["", "cat"]])
def test_folders_that_say_no_classes_are_none(tmp_path: Path, folders: list[str]) -> None:
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "x.tar", [(f"{f}/{n}.png", picture(n)) for n, f in enumerate(folders)])
    assert list_webdataset(tmp_path / "in").classes == ()


def test_every_member_is_in_the_shards_or_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    members = [
        ("a.png", picture(0)),
        ("README", b"x"),
        ("a.json", b"{}"),
        ("a.mask.png", picture(1)),
        ("._a.png", b"x"),
        ("b.txt", b"caption of a lost image"),
        ("c.tif", picture(2)),
    ]
    write_tar(tmp_path / "in" / "x.tar", members)
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert {sample.image for sample in read_all(tmp_path / "out")} == {picture(0), picture(2)}
    assert "left behind: members beside the images (1 .json, 1 .mask.png)" in capsys.readouterr().out
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert all(f'"x.tar/{name}"' in skipped for name in ("README", "._a.png", "b.txt"))


def test_tars_of_several_splits_are_not_one_set(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", [("1.png", picture(0)), ("1.cls", b"1")])
    splits = SOURCES["webdataset"](SourceRequest(tmp_path))
    assert {split: len(source.items) for split, source in splits.items()} == {"train": 2, "val": 1}


def test_a_tar_that_is_something_else_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    with pytest.raises(DataError, match=r"x\.tar is no tar archive but compressed with gzip: unpack it"):
        list_webdataset(tmp_path)


NAMES = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["a", "b", "d/a", "v1.0/a", ".a", "a b"]),
    st.sampled_from(["", ".0", ".1", ".mask", ".2024.01"]),
    st.sampled_from(["png", "cls", "json", "TIF", "x", "jpg"]),
)


@settings(max_examples=300, deadline=None)
@given(names=st.lists(NAMES | st.sampled_from(["README", "d/.DS_Store", "a."]), max_size=12))
def test_whatever_its_names_are_each_member_is_used_told_or_counted(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "names.tar"
    write_tar(path, [(name, b"1") for name in names])
    tars = _Tars([path], index=None, has_labels=False)
    items = list(tars.list_items())
    told = sum(tars.unlisted.counts.values()) + sum(tars.left_behind.values())
    images = sum(item.place != (NO_IMAGE, 0, -1) for item in items)
    told_labels = sum(name.endswith(".cls") for name, _ in tars.unlisted)
    told_labels += sum(count for ending, count in tars.left_behind.items() if ending.endswith("cls"))
    labels = sum(name.endswith(".cls") for name in names) - told_labels
    assert told + images + labels == len(names)
