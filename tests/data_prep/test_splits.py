"""Splits are never merged: each becomes a set of its own, or the two ways out are told."""

from pathlib import Path

import pytest

from cmae_scale.core.errors import ConfigError
from cmae_scale.data.index import read_index
from data_prep.sources import SOURCES, SourceRequest
from data_prep.sources.splits import find_role, find_splits, group_files
from tests.data_prep.images import fill, make, picture


def count(out: Path) -> dict[str, int]:
    return {
        str(path.parent.relative_to(out)): read_index(path.parent).total for path in out.rglob("index.json")
    }


@pytest.mark.parametrize("source", ["imagefolder", "flat"])
@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("Train", "Val"),
        ("training", "testing"),
        ("TRAIN", "valid", "test"),
        ("train", "dev"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("train_images", "test_images"),
    ],
)
@pytest.mark.parametrize("beside", [(), ("annotations/1.png",), ("labels.csv", "images/2.png")])
def test_folders_of_splits_become_sets_of_their_own(
    tmp_path: Path, source: str, names: tuple[str, ...], beside: tuple[str, ...]
) -> None:
    files = [f"{name}/{number % 2}/{number}.png" for name in names for number in range(3)]
    root = fill(tmp_path / "in", *files, *beside)
    assert make(source, root, tmp_path / "out") == 0
    assert count(tmp_path / "out") == dict.fromkeys(names, 3)
    told = (tmp_path / "out" / sorted(names)[0] / "skipped.jsonl") if beside else None
    assert told is None or "beside the folders of the splits" in told.read_text()
    assert make(source, root / names[0], tmp_path / "alone") == 0
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / names[0] / path.name).read_bytes()


def test_splits_have_the_same_classes_and_one_without_class_folders_has_no_labels(tmp_path: Path) -> None:
    root = fill(tmp_path, "train/a/1.png", "train/b/2.png", "val/b/3.png", "val/c/4.png", "test/5.png")
    splits = SOURCES["imagefolder"](SourceRequest(root))
    assert {source.classes for source in splits.values()} == {("a", "b", "c")}
    assert [item.label for item in splits["val"].items] == [1, 2]
    assert [(item.name, item.label) for item in splits["test"].items] == [("5.png", None)]


def test_a_split_without_an_image_is_told_and_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "train/a/1.png", "val/a/2.png", "test/labels.txt")
    assert make("imagefolder", root, tmp_path / "out") == 0
    assert count(tmp_path / "out") == {"train": 1, "val": 1}
    told = (tmp_path / "out" / "train" / "skipped.jsonl").read_text()
    assert '"test/", "kind": "unlisted", "reason": "a split without an image"' in told
    assert '"test/labels.txt", "kind": "unlisted", "reason": "no image by name (.txt)"' in told


def test_splits_in_folders_of_their_own_name_are_unwrapped(tmp_path: Path) -> None:
    """As archives leave them that are each unpacked into a folder."""
    root = fill(
        tmp_path,
        "seg_train/seg_train/a/1.png",
        "seg_train/seg_train/b/2.png",
        "seg_test/seg_test/b/3.png",
        "seg_train/notes.txt",
    )
    splits = SOURCES["imagefolder"](SourceRequest(root))
    assert {split: source.classes for split, source in splits.items()} == {
        "seg_test": ("a", "b"),
        "seg_train": ("a", "b"),
    }
    assert [item.name for item in splits["seg_train"].items] == ["a/1.png", "b/2.png"]
    assert [name for name, _ in splits["seg_train"].unlisted] == ["notes.txt"]


def test_one_folder_that_says_a_split_beside_others_is_refused_or_a_class(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", "train/a/1.png", "annotations/b/2.png")
    with pytest.raises(
        ConfigError, match=r"looks like a split.*write --root .*train for it alone, or --merge"
    ):
        SOURCES["imagefolder"](SourceRequest(root))
    merged = SOURCES["imagefolder"](SourceRequest(root, merge_splits=True))
    assert merged[""].classes == ("annotations", "train")
    vehicles = fill(tmp_path / "vehicles", "train/1.png", "bus/2.png")
    assert SOURCES["imagefolder"](SourceRequest(vehicles))[""].classes == ("bus", "train")


@pytest.mark.parametrize("source", ["imagefolder", "flat"])
def test_splits_further_down_are_not_merged_either(tmp_path: Path, source: str) -> None:
    root = fill(tmp_path, "images/Train/1.png", "images/Test/2.png", "masks/3.png")
    with pytest.raises(ConfigError, match=r"images holds splits \(Test, Train\).*--root, or --merge_splits"):
        SOURCES[source](SourceRequest(root))
    assert len(SOURCES[source](SourceRequest(root, merge_splits=True))[""].items) == 3


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (("train.parquet", "test.parquet"), {"train": 1, "test": 1}),
        (("Train_0.parquet", "Train_1.parquet", "VAL.parquet"), {"train": 2, "val": 1}),
        (("in-train-000.tar", "in-val-000.tar"), {"train": 1, "val": 1}),
        (("train-0.tar", "train-1.tar"), {"": 2}),
        (("a.parquet", "b.parquet"), {"": 2}),
        (("contest.parquet", "evaluator.parquet"), {"": 2}),
    ],
)
def test_files_are_grouped_by_the_split_in_their_names(
    names: tuple[str, ...], groups: dict[str, int]
) -> None:
    found = group_files([Path(name) for name in names])
    assert {split: len(paths) for split, paths in found.items()} == groups


def test_files_of_no_split_beside_others_are_refused_with_the_two_ways_out() -> None:
    with pytest.raises(
        ConfigError, match=r"--root 'in/train\*\.parquet', or --merge_splits takes them as one"
    ):
        group_files([Path("in/train-0.parquet"), Path("in/extra.parquet")])


def test_names_of_splits_are_known_in_any_case() -> None:
    assert [find_role(name) for name in ("TRAIN", "Validation", "testing", "bus")] == [
        "train",
        "val",
        "test",
        None,
    ]
    assert find_splits(["train", "bus"]) == []
    assert find_splits(["train", "bus", "val"]) == ["train", "val"]
    assert find_splits(["train_station", "test_tube", "bus"]) == [], "classes"
    assert find_splits(["test1", "test2"]) == [], "classes"
    assert find_splits(["bullet_train", "train2014", "bus", "val2017"]) == ["train2014", "val2017"]


@pytest.mark.parametrize("folders", [False, True])
def test_parquet_files_of_splits_become_sets_of_their_own(tmp_path: Path, folders: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "in"
    for number, split in enumerate(("train", "test")):
        path = root / f"{split}/0.parquet" if folders else root / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {"image": [picture(number), picture(9 + number)], "label": ["a", "bc"[number]]}
        parquet.write_table(pyarrow.table(rows), path)
    assert make("huggingface", root, tmp_path / "out") == 0
    assert count(tmp_path / "out") == {"train": 2, "test": 2}
    assert read_index(tmp_path / "out" / "test").classes == ("a", "b", "c")
    assert make("huggingface", root, tmp_path / "all", "--merge_splits") == 0


def test_a_column_that_says_the_split_divides_a_table(tmp_path: Path) -> None:
    root = fill(tmp_path / "in", *(f"{number}.png" for number in range(4)))
    lines = ("0.png,train,x", "1.png,val,y", "2.png,train,y", "3.png,val,y")
    (root / "list.csv").write_text("\n".join(("path,Split,label", *lines)))
    assert make("csv", root / "list.csv", tmp_path / "out") == 0
    assert count(tmp_path / "out") == {"train": 2, "val": 2}
    assert read_index(tmp_path / "out" / "val").classes == ("x", "y")
    assert make("csv", root / "list.csv", tmp_path / "all", "--merge_splits") == 0
    assert count(tmp_path / "all") == {".": 4}
