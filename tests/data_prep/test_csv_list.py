"""A table of paths and labels."""

from pathlib import Path

import pytest

from cmae_scale.core.errors import ConfigError
from data_prep.sources import SOURCES, Source, SourceRequest


def list_csv(root: Path | None, *, image: str | None = None, label: str | None = None) -> Source:
    return SOURCES["csv"](SourceRequest(root, image_column=image, label_column=label))[""]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "list.csv"
    path.write_text(text)
    return path


def test_names_are_numbered_in_sorted_order(tmp_path: Path) -> None:
    source = list_csv(write(tmp_path, 'path,label\nx/2.jpg,dog\n"a,b.jpg",cat\nc.jpg,\n'))
    assert source.classes == ("cat", "dog")
    assert [(item.name, item.label) for item in source.items] == [
        ("x/2.jpg", 1),
        ("a,b.jpg", 0),
        ("c.jpg", None),
    ]


def test_whole_numbers_are_labels_as_they_are(tmp_path: Path) -> None:
    source = list_csv(write(tmp_path, "label,path\n03,a.jpg\n0,b.jpg\n"))
    assert source.classes == ("0", "1", "2", "3")
    assert [item.label for item in source.items] == [3, 0]


def test_paths_are_relative_to_the_table_or_absolute(tmp_path: Path) -> None:
    (tmp_path / "near.jpg").write_bytes(b"near")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "away.jpg").write_bytes(b"far")
    source = list_csv(write(tmp_path, f"path\nnear.jpg\n{tmp_path / 'far' / 'away.jpg'}\n"))
    assert [source.read(item) for item in source.items] == [b"near", b"far"]
    assert {item.label for item in source.items} == {None}


def test_columns_may_have_other_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffimage_id,kind,more\na.jpg,x,1\n\nb.jpg,y,2\n")
    source = list_csv(path, image="image_id", label="kind")
    assert [(item.name, item.label) for item in source.items] == [("a.jpg", 0), ("b.jpg", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'path'"),
        ("file,label\na.jpg,1\n", "has no column 'path' .its first line is file,label"),
        ("path,label\n", "lists no image"),
        ("path,label\na.jpg,1\nb.jpg\n", "line 3 has 1 fields, the heading has 2"),
    ],
)
def test_a_table_that_is_none_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list_csv(write(tmp_path, text))


def test_mistaken_roots_and_columns_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --root, the CSV file"):
        list_csv(None)
    with pytest.raises(ConfigError, match="is not a file"):
        list_csv(tmp_path)
    with pytest.raises(ConfigError, match="has no column 'kind'"):
        list_csv(write(tmp_path, "path,label\na.jpg,1\n"), label="kind")
