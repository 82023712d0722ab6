"""Folders of image files."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item, Listing
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, existing_folder
from data_prep.unlisted import Unlisted, is_clutter, say_other_file

SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


def list_imagefolder(request: SourceRequest) -> dict[str, Source]:
    """ROOT/<class>/**/<image>: the folder's name is the class, classes are numbered in sorted order.

    Folders without an image still get a number, so that train and val agree on the others.
    """
    root = existing_folder(request, "imagefolder")
    unlisted = Unlisted()
    classes, _ = _look_into(root, "", unlisted=unlisted, loose="beside the class folders: of no class")
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
        for name in _walk(root, folder, unlisted=unlisted, above=(_identify(root),))
    )
    _at_least_one(items, root)
    read = functools.partial(read_file, root)
    return {"": Source(f"imagefolder {root}", items, tuple(classes), read, unlisted=unlisted)}


def list_flat(request: SourceRequest) -> dict[str, Source]:
    """ROOT/**/<image> without labels."""
    root = existing_folder(request, "flat")
    unlisted = Unlisted()
    items = Listing(Item(name, None) for name in _walk(root, "", unlisted=unlisted))
    _at_least_one(items, root)
    return {"": Source(f"flat {root}", items, (), functools.partial(read_file, root), unlisted=unlisted)}


def read_file(root: Path, item: Item) -> bytes:
    """The file of an item whose name is its path below `root` (or an absolute one)."""
    return (root / item.name).read_bytes()


def _at_least_one(items: Sequence[Item], root: Path) -> None:
    if not items:
        raise ConfigError(f"--root {root} holds no image file ({', '.join(IMAGE_ENDINGS)})")


def _walk(
    root: Path, folder: str, *, unlisted: Unlisted, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Image files below root/folder, relative to root, in an order that depends on their names alone.

    Holds the names of one folder (and of those above it) at a time. Linked folders are followed; ConfigError
    for one that leads back to a folder above it.
    """
    above = (*above, _identify(root / folder))
    if above[-1] in above[:-1]:
        raise ConfigError(f"{root / folder} links to a folder that it lies in: remove the link")
    folders, images = _look_into(root, folder, unlisted=unlisted)
    is_folder = set(folders)
    for name in sorted((*folders, *images)):
        inner = f"{folder}/{name}" if folder else name
        if name in is_folder:
            yield from _walk(root, inner, unlisted=unlisted, above=above)
        else:
            yield inner


def _look_into(
    root: Path, folder: str, *, unlisted: Unlisted, loose: str | None = None
) -> tuple[list[str], list[str]]:
    """Names of the folders and of the images in one folder, sorted; what else is there goes to `unlisted`.

    So do the images themselves where `loose` says why they cannot be taken.
    """
    folders, images, others = [], [], []
    with os.scandir(root / folder) as entries:
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
        unlisted.add(name, reason)
    return sorted(folders), sorted(images)


def _identify(folder: Path) -> tuple[int, int]:
    """Equal for two paths to the same folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino
