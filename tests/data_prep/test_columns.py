"""Hugging Face data sets: Arrow folders and Parquet files, read with pyarrow alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main
from data_prep.sources import SOURCES, Source, SourceRequest
from tests.data_prep.images import picture

pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 23
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog", "emu"]}}


def build_table(first: int = 0, count: int = COUNT) -> Any:
    images = [{"bytes": picture(number), "path": "/etc/passwd"} for number in range(first, first + count)]
    table = pyarrow.table({"image": images, "label": [number % 3 for number in range(first, first + count)]})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})


def write_arrow(folder: Path, table: Any) -> None:
    """What Dataset.save_to_disk leaves, as far as it matters here."""
    folder.mkdir(parents=True)
    with (
        pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))


def list_huggingface(
    root: Path | None, *, image: str | None = None, label: str | None = None
) -> dict[str, Source]:
    return SOURCES["huggingface"](SourceRequest(root, image_column=image, label_column=label))


def make(root: Path, out: Path, *options: str) -> int:
    argv = ["--source", "huggingface", "--root", str(root), "--out", str(out), "--samples_per_shard", "4"]
    return run_command(main, [*argv, "--processes", "1", *options])


def read_all(folder: Path) -> dict[bytes, int | None]:
    index = read_index(folder)
    return {
        sample.image: sample.label
        for number, shard in enumerate(index.shards)
        for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
    }


ORIGINALS = {picture(number): number % 3 for number in range(COUNT)}


def test_an_arrow_folder_is_read_with_its_class_names(tmp_path: Path) -> None:
    write_arrow(tmp_path / "in", build_table())
    source = list_huggingface(tmp_path / "in")[""]
    assert source.classes == ("cat", "dog", "emu")
    assert {source.read(item): item.label for item in source.items} == ORIGINALS
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert read_all(tmp_path / "out") == ORIGINALS


def test_what_the_datasets_library_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="only to write what it writes")
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    features = datasets.Features(image=datasets.Image(), label=names)
    rows = {
        "image": [{"bytes": image, "path": None} for image in ORIGINALS],
        "label": list(ORIGINALS.values()),
    }
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole.select(range(20)), test=whole.select(range(20, 23))).save_to_disk(
        tmp_path / "in"
    )
    whole.to_parquet(tmp_path / "in.parquet")
    splits = list_huggingface(tmp_path / "in")
    assert {split: len(source.items) for split, source in splits.items()} == {"train": 20, "test": 3}
    assert make(tmp_path / "in", tmp_path / "out") == 0
    assert read_all(tmp_path / "out" / "train") | read_all(tmp_path / "out" / "test") == ORIGINALS
    assert make(tmp_path / "in.parquet", tmp_path / "flat") == 0
    assert read_all(tmp_path / "flat") == ORIGINALS
    assert read_index(tmp_path / "flat").classes == ("cat", "dog", "emu")


@pytest.mark.parametrize("options", [("--processes", "2"), ("--limit", "5"), ("--part", "1/1")])
def test_parquet_is_staged_in_one_pass_and_leaves_nothing(tmp_path: Path, options: tuple[str, str]) -> None:
    (tmp_path / "in").mkdir()
    for number, (first, count) in enumerate(((0, 11), (11, 12))):
        path = tmp_path / "in" / f"train-{number:05d}-of-00002.parquet"
        parquet.write_table(build_table(first, count), path, row_group_size=4)
    assert make(tmp_path / "in", tmp_path / "out", *options) == 0
    made = read_all(tmp_path / "out")
    assert made.items() <= ORIGINALS.items()
    assert len(made) == (5 if "--limit" in options else COUNT)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".offsets", ".json"}


def test_parts_stage_only_what_they_need(tmp_path: Path) -> None:
    parquet.write_table(build_table(), tmp_path / "in.parquet", row_group_size=4)
    source = list_huggingface(tmp_path / "in.parquet")[""]
    assert source.stage is not None
    (tmp_path / "scratch").mkdir()
    read = source.stage(tmp_path / "scratch", iter([source.items[3], source.items[22]]))
    assert [read(source.items[number]) for number in (3, 22)] == [picture(3), picture(22)]
    assert (tmp_path / "scratch" / "images").stat().st_size == len(picture(3)) + len(picture(22))


def test_splits_of_parquet_files_go_to_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, first in (("train", 0), ("validation", 4)):
        parquet.write_table(build_table(first, 4), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert make(tmp_path, tmp_path / "out") == 0
    assert set(read_all(tmp_path / "out" / "validation")) == {picture(number) for number in range(4, 8)}


def test_a_row_without_bytes_is_bad_and_its_path_is_not_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pyarrow.table(
        {"image": [{"bytes": picture(0), "path": None}, {"bytes": None, "path": "/etc/passwd"}]}
    )
    write_arrow(tmp_path / "arrow", table)
    parquet.write_table(table, tmp_path / "in.parquet")
    for root in (tmp_path / "arrow", tmp_path / "in.parquet"):
        out = tmp_path / f"out {root.name}"
        assert make(root, out) == 2
        assert "row 1: the row holds no bytes of an image" in capsys.readouterr().err
        assert make(root, out, "--skip_bad") == 0
        assert read_all(out) == {picture(0): None}


def test_columns_that_cannot_be_guessed_are_asked_for(tmp_path: Path) -> None:
    table = pyarrow.table({"left": [b"l"], "right": [b"r"], "name": ["x"], "kind": [7]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"write --image_column NAME .*: left, right"):
        list_huggingface(tmp_path / "a.parquet")
    source = list_huggingface(tmp_path / "a.parquet", image="right", label="kind")[""]
    assert [item.label for item in source.items] == [7]
    assert len(source.classes) == 8
    assert list_huggingface(tmp_path / "a.parquet", image="left", label="name")[""].classes == ("x",)
    with pytest.raises(ConfigError, match="has no column 'none'"):
        list_huggingface(tmp_path / "a.parquet", image="left", label="none")


def test_a_column_of_paths_is_no_column_of_images(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": ["a.jpg"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(
        ConfigError, match=r"no column of encoded images \(it has image, label\): .* --source csv"
    ):
        list_huggingface(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        ([10.0, 2.0, -1.0, None], tuple(map(str, range(11))), [10, 2, None, None]),
        (["10", "2", "-1", "cat"], ("10", "2", "cat"), [0, 1, None, 2]),
        ([1.0, float("nan"), float("inf") - float("inf"), 0.0], ("0", "1"), [1, None, None, 0]),
        ([10**9, -1, 3, 3], ("3", "1000000000"), [1, None, 0, 0]),
        ([2**63, 1, 1, None], ("1", str(2**63)), [1, 0, 0, None]),
    ],
)
def test_columns_follow_the_one_rule_for_labels(
    tmp_path: Path, values: list[object], classes: tuple[str, ...], labels: list[int | None]
) -> None:
    kind = pyarrow.uint64() if 2**63 in values else None
    column = pyarrow.array(values, type=kind)
    table = pyarrow.table({"image": [picture(n) for n in range(4)], "Target": column})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = list_huggingface(tmp_path / "a.parquet")[""]
    assert source.classes == classes
    assert [item.label for item in source.items] == labels
    assert f"labels: column 'Target', {len(classes)} classes" in source.notes


def test_a_number_that_the_schema_has_no_name_for_is_told(tmp_path: Path) -> None:
    table = build_table(0, 4)
    wrong = table.set_column(1, "label", pyarrow.array([0, 1, 7, -1]))
    parquet.write_table(wrong.replace_schema_metadata(table.schema.metadata), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="holds 7 where its schema names 3 classes: --no_labels takes"):
        list_huggingface(tmp_path / "a.parquet")
    assert make(tmp_path / "a.parquet", tmp_path / "out", "--no_labels") == 0


def test_damaged_and_hostile_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither a data set written by save_to_disk nor"):
        list_huggingface(tmp_path)
    with pytest.raises(ConfigError, match="needs --root"):
        list_huggingface(None)
    for number, inner in enumerate(("one", "one/data", "one/train", "one/two")):
        above = tmp_path / str(number)
        (above / inner).mkdir(parents=True)
        (above / inner / "0.parquet").touch()
        folder = "one/two" if inner == "one/two" else "one"
        with pytest.raises(ConfigError, match=rf"but {above}/{folder} does: write --root {above}/{folder}$"):
            list_huggingface(above)
    write_arrow(tmp_path / "in", build_table())
    data = tmp_path / "in" / "data-00000-of-00001.arrow"
    data.write_bytes(data.read_bytes()[:3000])
    with pytest.raises(DataError, match="copy it again"):
        list_huggingface(tmp_path / "in")
    (tmp_path / "in" / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(DataError, match="outside of its folder"):
        list_huggingface(tmp_path / "in")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="copy it again"):
        list_huggingface(tmp_path / "bad.parquet")
