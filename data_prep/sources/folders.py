"""Folders of image files."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item, Listing
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, existing_folder

SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def list_imagefolder(request: SourceRequest) -> dict[str, Source]:
    """ROOT/<class>/**/<image>: the folder's name is the class, classes are numbered in sorted order.

    Folders without an image still get a number, so that train and val agree on the others.
    """
    root = existing_folder(request, "imagefolder")
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ConfigError(
            f"--root {root} holds no class folders: write --source flat for images without classes, "
            "or name the folder above the class folders"
        )
    if SPLIT_NAMES.issuperset(classes):
        raise ConfigError(
            f"--root {root} holds splits, not classes: write --root {root / classes[0]} and so on"
        )
    items = Listing(
        Item(name, label)
        for label, folder in enumerate(classes)
        for name in _walk(root, folder, above=(_identify(root),))
    )
    _at_least_one(items, root)
    return {"": Source(f"imagefolder {root}", items, tuple(classes), functools.partial(read_file, root))}


def list_flat(request: SourceRequest) -> dict[str, Source]:
    """ROOT/**/<image> without labels."""
    root = existing_folder(request, "flat")
    items = Listing(Item(name, None) for name in _walk(root, ""))
    _at_least_one(items, root)
    return {"": Source(f"flat {root}", items, (), functools.partial(read_file, root))}


def read_file(root: Path, item: Item) -> bytes:
    """The file of an item whose name is its path below `root` (or an absolute one)."""
    return (root / item.name).read_bytes()


def _at_least_one(items: Sequence[Item], root: Path) -> None:
    if not items:
        raise ConfigError(f"--root {root} holds no image file ({', '.join(IMAGE_ENDINGS)})")


def _walk(root: Path, folder: str, *, above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Image files below root/folder, relative to root, in an order that depends on their names alone.

    Holds the names of one folder (and of those above it) at a time. Linked folders are followed; ConfigError
    for one that leads back to a folder above it.
    """
    above = (*above, _identify(root / folder))
    if above[-1] in above[:-1]:
        raise ConfigError(f"{root / folder} links to a folder that it lies in: remove the link")
    names, folders = [], set()
    with os.scandir(root / folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.add(entry.name)
            elif not entry.name.lower().endswith(IMAGE_ENDINGS):
                continue
            names.append(entry.name)
    names.sort()
    for name in names:
        inner = f"{folder}/{name}" if folder else name
        if name in folders:
            yield from _walk(root, inner, above=above)
        else:
            yield inner


def _identify(folder: Path) -> tuple[int, int]:
    """Equal for two paths to the same folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino
