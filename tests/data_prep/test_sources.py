"""Listing what people have: order, labels, and the mistakes that are told before anything is written."""

from pathlib import Path

import pytest
from PIL import Image

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item
from data_prep.sources import SOURCES, Source, SourceRequest


def list_source(kind: str, root: Path | None) -> dict[str, Source]:
    return SOURCES[kind](SourceRequest(root))


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_an_image_folder_numbers_its_classes_in_sorted_order(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jpg", "b/1.JPEG", "a/x/deep.png", "c/3.webp")
    (tmp_path / "aa empty").mkdir()
    source = list_source("imagefolder", tmp_path)[""]
    assert source.classes == ("a", "aa empty", "b", "c")
    assert list(source.items) == [
        Item("a/x/deep.png", 0),
        Item("b/1.JPEG", 2),
        Item("b/2.jpg", 2),
        Item("c/3.webp", 3),
    ]
    assert source.read(source.items[1]) == b"b/1.JPEG"


def test_other_files_and_hidden_ones_are_not_listed(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a/1.jpg",
        "a/notes.txt",
        "a/1.json",
        "a/.hidden.jpg",
        ".cache/1.jpg",
        "a/.x/2.jpg",
        "3.jpg",
        "a/g.svg",
    )
    assert [item.name for item in list_source("imagefolder", tmp_path)[""].items] == ["a/1.jpg"]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "b/2.png", "a/3.jpg")
    source = list_source("flat", tmp_path)[""]
    assert list(source.items) == [Item("1.jpg", None), Item("a/3.jpg", None), Item("b/2.png", None)]
    assert source.classes == ()


def test_digits_are_split_by_class_without_overlap() -> None:
    splits = list_source("digits", None)
    train, val = splits["train"], splits["val"]
    names = [item.name for source in (train, val) for item in source.items]
    assert len(names) == len(set(names)) == 1797
    for digit in range(10):
        counts = [sum(item.label == digit for item in source.items) for source in (train, val)]
        assert counts[1] / sum(counts) == pytest.approx(0.2, abs=0.01)


def test_a_digit_is_a_small_png_of_its_own() -> None:
    source = list_source("digits", None)["val"]
    images = {source.read(item) for item in source.items[:5]}
    assert len(images) == 5
    assert all(image.startswith(b"\x89PNG") for image in images)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "holds no class folders: write --source flat"),
        (("1.jpg",), "holds no class folders: write --source flat"),
        (("a/1.txt", "b/2.svg"), "holds no image file"),
    ],
)
def test_an_image_folder_that_is_none_says_why(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ConfigError, match=message):
        list_source("imagefolder", tmp_path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.tar", "write --source webdataset"),
        ("a.parquet", "write --source huggingface"),
        ("list.csv", "write --source csv"),
        ("a.zip", "unpack it first"),
        ("a.txt", "name the folder of the images"),
    ],
)
def test_a_folder_of_something_else_says_how_to_read_it(tmp_path: Path, name: str, remedy: str) -> None:
    touch(tmp_path, f"x/{name}")
    for kind in ("flat", "imagefolder"):
        with pytest.raises(
            ConfigError, match=rf"holds no image file \(found: 1 no image by name.*: {remedy}"
        ):
            list_source(kind, tmp_path)


def test_an_archive_as_root_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK\x03\x04 more")
    for kind in ("flat", "imagefolder", "imagenet"):
        with pytest.raises(ConfigError, match=r"images\.zip is a zip archive: unpack it"):
            list_source(kind, tmp_path / "images.zip")


@pytest.mark.parametrize(
    ("name", "remedy"), [("a/1.tar", "write --root .*/a$"), ("1.tar.gz", "unpack"), ("1.tgz", "unpack")]
)
def test_tars_one_level_down_and_compressed_ones_are_pointed_at(
    tmp_path: Path, name: str, remedy: str
) -> None:
    touch(tmp_path, name)
    with pytest.raises(ConfigError, match=rf"holds no \*\.tar: {remedy}"):
        list_source("webdataset", tmp_path)


def test_missing_and_empty_roots_are_told(tmp_path: Path) -> None:
    for kind in ("flat", "imagefolder"):
        with pytest.raises(ConfigError, match="needs --root"):
            list_source(kind, None)
        with pytest.raises(ConfigError, match="is not a folder"):
            list_source(kind, tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no image file"):
        list_source("flat", tmp_path)
    with pytest.raises(ConfigError, match="leave out --root"):
        list_source("digits", tmp_path)


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "real/a/1.jpg")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to(tmp_path / "real" / "a")
    source = list_source("imagefolder", tmp_path / "root")[""]
    assert source.read(source.items[0]) == b"real/a/1.jpg"


def test_a_link_that_leads_in_a_circle_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg", "a/deep/2.jpg")
    (tmp_path / "a" / "deep" / "up").symlink_to("..")
    for kind in ("flat", "imagefolder"):
        with pytest.raises(ConfigError, match=r"a/deep/up links to a folder that it lies in: remove"):
            list_source(kind, tmp_path)


def test_two_links_to_one_folder_are_no_circle(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "b").symlink_to("a")
    assert [item.name for item in list_source("flat", tmp_path)[""].items] == ["a/1.jpg", "b/1.jpg"]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    with open(bytes(folder) + b"/\xff.png", "wb") as file:  # noqa: PTH123 -- a name that Path cannot spell
        Image.new("L", (4, 4)).save(file, "PNG")
    source = list_source("imagefolder", tmp_path)[""]
    assert source.read(source.items[0]).startswith(b"\x89PNG")
