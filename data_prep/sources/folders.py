"""Folders of image files."""

import functools
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cmae_scale.core.errors import ConfigError, DataError
from data_prep.listing import Item, Listing
from data_prep.sources.labels import decode_name
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, existing_folder, show_path
from data_prep.sources.splits import MERGE, find_role, find_splits, read_split
from data_prep.unlisted import Unlisted, is_clutter, say_other_file

READ_BYTES = 1 << 26
NO_CLASS = "beside the class folders: of no class"
PACKED = {
    ".tar": "write --source webdataset",
    ".parquet": "write --source huggingface",
    ".arrow": "write --source huggingface",
    ".csv": "write --source csv with the file as --root",
    ".zip": "unpack it first",
    ".gz": "unpack it first",
}


def list_imagefolder(request: SourceRequest) -> dict[str, Source]:
    """ROOT/<class>/**/<image>, or ROOT/<split>/<class>/**/<image>: the folder's name is the class.

    Classes are numbered in sorted order, the same for all splits. Folders without an image get a number too.
    """
    root = existing_folder(request, "imagefolder")
    trees = _find_trees(root, request)
    folders = {split: _find_classes(tree, request) for split, tree in trees.items()}
    classes = tuple(sorted({name for names in folders.values() for name in names}))
    if not classes:
        raise ConfigError(
            f"--root {root} holds no class folders: write --source flat for images without classes, "
            "or name the folder above the class folders"
        )
    if "" in trees and not request.merge_splits:
        _refuse_one_split(trees[""], folders[""])
    listings = {split: Listing(_list_classes(tree, folders[split], classes)) for split, tree in trees.items()}
    return _build_sources("imagefolder", trees, listings, classes)


def list_flat(request: SourceRequest) -> dict[str, Source]:
    """ROOT/**/<image>, or ROOT/<split>/**/<image>, without labels."""
    trees = _find_trees(existing_folder(request, "flat"), request)
    listings = {split: Listing(Item(name, None) for name in tree.walk()) for split, tree in trees.items()}
    return _build_sources("flat", trees, listings, ())


def read_file(root: Path, item: Item) -> bytes:
    """The file of an item whose name is its path below `root` (or an absolute one).

    DataError for a pipe or a device, which might never end.
    """
    path = os.path.join(root, item.name)  # noqa: PTH118 -- a Path costs as much as reading a small file
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        raise DataError("is a pipe, a device or a folder: no image")
    handle = os.open(path, os.O_RDONLY)
    try:
        data = part = os.read(handle, status.st_size + 1)
        while part and len(data) != status.st_size:  # it has changed, or is larger than one call gives
            part = os.read(handle, READ_BYTES)
            data += part
    finally:
        os.close(handle)
    return data


class _Tree(NamedTuple):
    """A folder with all below it. What is there and is not taken goes to `unlisted`."""

    root: Path
    unlisted: Unlisted
    merge_splits: bool

    def walk(self, folder: str = "", *, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
        """Image files below root/folder, relative to root, in an order that depends on their names alone.

        Holds the names of one folder (and of those above it) at a time. Linked folders are followed;
        ConfigError for one that leads back to a folder above it, and for splits below.
        """
        above = (*above, _identify(self.root / folder))
        if above[-1] in above[:-1]:
            raise ConfigError(f"{self.root / folder} links to a folder that it lies in: remove the link")
        folders, images = self.look_into(folder)
        if not self.merge_splits and len(splits := find_splits(folders)) > 1:
            raise ConfigError(
                f"{self.root / folder} holds splits ({', '.join(splits)}), which would become one set: name "
                f"it as --root, or {MERGE}"
            )
        is_folder = set(folders)
        for name in sorted((*folders, *images)):
            inner = f"{folder}/{name}" if folder else name
            if name in is_folder:
                yield from self.walk(inner, above=above)
            else:
                yield inner

    def look_into(self, folder: str = "", *, loose: str | None = None) -> tuple[list[str], list[str]]:
        """Names of the folders and of the images in one folder, sorted.

        What else is there is unlisted, and so are its images where `loose` says why they cannot be taken.
        """
        folders, images, others = [], [], []
        with os.scandir(self.root / folder) as entries:
            for entry in entries:
                inner = f"{folder}/{entry.name}" if folder else entry.name
                if (reason := is_clutter(entry.name)) is not None:
                    others.append((f"{inner}/" if entry.is_dir() else inner, reason))
                elif entry.is_dir():
                    folders.append(entry.name)
                elif not entry.name.lower().endswith(IMAGE_ENDINGS):
                    others.append((inner, say_other_file(entry.name)))
                elif loose is not None:
                    others.append((inner, loose))
                else:
                    images.append(entry.name)
        for name, reason in sorted(others):
            self.unlisted.add(name, reason)
        return sorted(folders), sorted(images)


def _find_trees(root: Path, request: SourceRequest) -> dict[str, _Tree]:
    """The tree of each split that a folder holds, under its own name; "" for one that is a set by itself."""
    folders = _list_folders(root)
    splits = [] if request.merge_splits else find_splits(folders)
    if not splits:
        return {"": _Tree(root, Unlisted(), request.merge_splits)}
    trees = {split: _unwrap(_Tree(root / split, Unlisted(), merge_splits=False)) for split in splits}
    unlisted = trees[splits[0]].unlisted
    _Tree(root, unlisted, merge_splits=False).look_into(loose="beside the folders of the splits")
    for folder in folders:
        if folder not in trees:
            unlisted.add(f"{folder}/", "beside the folders of the splits")
    return trees if len(trees) > 1 else {"": trees[splits[0]]}


def _unwrap(tree: _Tree) -> _Tree:
    """The tree, or the only folder in it if that is called for the same split: archives unpack to such."""
    inner = _list_folders(tree.root)
    if len(inner) != 1 or read_split(inner[0]) != read_split(tree.root.name):
        return tree
    tree.look_into(loose=NO_CLASS)
    return tree._replace(root=tree.root / inner[0])


def _list_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and is_clutter(entry.name) is None)


def _find_classes(tree: _Tree, request: SourceRequest) -> dict[str, str]:
    """The folder of each class, by its name as text. Without labels any text will do."""
    encoding = "latin-1" if request.no_labels else request.encoding
    classes: dict[str, str] = {}
    for folder in _list_folders(tree.root):
        name = decode_name(folder, place=f"class folder of {show_path(tree.root)}", encoding=encoding)
        if name in classes:
            raise ConfigError(f"two folders of {show_path(tree.root)} are the class '{name}': rename one")
        classes[name] = folder
    return classes


def _list_classes(tree: _Tree, folders: Mapping[str, str], classes: tuple[str, ...]) -> Iterator[Item]:
    """The images of the class folders; of a split that has none, all images, without labels."""
    if not folders:
        yield from (Item(name, None) for name in tree.walk())
        return
    tree.look_into(loose=NO_CLASS)
    numbers = {name: label for label, name in enumerate(classes)}
    above = (_identify(tree.root),)
    for name in sorted(folders):
        yield from (Item(image, numbers[name]) for image in tree.walk(folders[name], above=above))


def _refuse_one_split(tree: _Tree, folders: Mapping[str, str]) -> None:
    """ConfigError for a split among folders that are none; a class of such a name has images right in it."""
    for folder in filter(find_role, folders.values()):
        inner, images = _Tree(tree.root, Unlisted(), merge_splits=True).look_into(folder)
        if inner and not images:
            raise ConfigError(
                f"{tree.root / folder} looks like a split, beside folders that are none: write --root "
                f"{tree.root / folder} for it alone, or --merge_splits if it is a class"
            )


def _build_sources(
    kind: str, trees: Mapping[str, _Tree], listings: Mapping[str, Listing], classes: tuple[str, ...]
) -> dict[str, Source]:
    """The source of each split that has an image; ConfigError if none has."""
    splits = [split for split in trees if listings[split]]
    if not splits:
        raise ConfigError(_say_no_image(next(iter(trees.values()))))
    for split, tree in trees.items():
        if split not in splits:
            trees[splits[0]].unlisted.add(f"{split}/", "a split without an image")
            for name, reason in tree.unlisted:
                trees[splits[0]].unlisted.add(f"{split}/{name}", reason)
    return {
        split: Source(
            f"{kind} {show_path(trees[split].root)}",
            listings[split],
            classes,
            functools.partial(read_file, trees[split].root),
            unlisted=trees[split].unlisted,
        )
        for split in splits
    }


def _say_no_image(tree: _Tree) -> str:
    found = ", ".join(f"{count:,} {reason}" for reason, count in tree.unlisted.counts.most_common(3))
    remedy = next((PACKED[kind] for kind in PACKED if f"({kind})" in found), "name the folder of the images")
    return f"--root {tree.root} holds no image file (found: {found or 'nothing'}): {remedy}"


def _identify(folder: Path) -> tuple[int, int]:
    """Equal for two paths to the same folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino
