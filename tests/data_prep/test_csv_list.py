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
        ("photo,label\na,1\n", "has no column 'path' .its first line is photo,label"),
        ("a.jpg,1\nb.jpg,0\n", "has no column names .* put a line 'path,label' above it"),
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


@pytest.mark.parametrize(
    "heading", ["path, label", " Path ,LABEL", "file_name,target", "image,class", "img;category"]
)
def test_usual_names_of_columns_are_guessed_and_told(tmp_path: Path, heading: str) -> None:
    between = ";" if ";" in heading else ","
    source = list_csv(write(tmp_path, f"{heading}\na.jpg{between} dog\nb.jpg{between} cat\n"))
    assert [(item.name, item.label) for item in source.items] == [("a.jpg", 1), ("b.jpg", 0)]
    image, label = (name.strip() for name in heading.split(between))
    assert source.notes == (f"images: column '{image}'", f"labels: column '{label}', 2 classes")


def test_a_table_without_labels_says_so(tmp_path: Path) -> None:
    source = list_csv(write(tmp_path, "path,colour\na.jpg,red\n"))
    assert [item.label for item in source.items] == [None]
    assert any("no labels: no column is called label, " in note for note in source.notes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "latin-1"])
def test_tables_in_any_encoding_have_the_same_classes(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes("path,label\nä.jpg,café\nb.jpg,thé\n".encode(encoding))
    known = None if encoding in ("utf-8", "utf-8-sig", "utf-16") else encoding
    source = SOURCES["csv"](SourceRequest(path, encoding=known))[""]
    assert source.classes == ("café", "thé")
    assert source.items[0].name == "ä.jpg"


def test_a_class_that_is_not_utf8_is_told_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_bytes("path,label\nä.jpg,café\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"column 'label': b'caf\\xe9' is not UTF-8: .* --encoding cp1252"):
        list_csv(path)
    unlabelled = SOURCES["csv"](SourceRequest(path, no_labels=True))[""]
    assert [item.name for item in unlabelled.items] == ["\udce4.jpg"], (
        "the bytes of a path, whatever they are"
    )
    for encoding in ("utf-16", "ascii"):
        with pytest.raises(ConfigError, match="cannot be read as text"):
            SOURCES["csv"](SourceRequest(path, encoding=encoding))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08 more", "is compressed with gzip: unpack it"),
        (b"PK\x03\x04 more", "is a zip archive: unpack it"),
        (b"PAR1 more", "is a Parquet file: pack it with --source huggingface"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"p\0a\0t\0h\0,\0l\0\n\0a\0", "--encoding"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list_csv(tmp_path / "list.csv")
