"""Readers of what people have: a source lists its items cheaply, and reads one when it is written.

To add one: a function from a root folder to `dict[split, Source]`, and its line in SOURCES.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from cmae_scale.core.errors import ConfigError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
DIGIT_PX = 32  # side of the enlarged 8x8 originals
DIGITS_HELD_OUT = 0.2


class Item(NamedTuple):
    """One image. `name` is unique within its source and says to a user which one it is."""

    name: str
    label: int | None


@dataclass(frozen=True)
class Source:
    """Images and where their bytes come from. `read` must be picklable: it runs in other processes."""

    title: str
    items: Sequence[Item]
    classes: tuple[str, ...]
    read: Callable[[Item], bytes]


def list_imagefolder(root: Path | None) -> dict[str, Source]:
    """ROOT/<class>/**/<image>: the folder's name is the class, classes are numbered in sorted order.

    Folders without an image still get a number, so that train and val agree on the others.
    """
    root = _existing(root, "imagefolder")
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
    items = [Item(name, label) for label, folder in enumerate(classes) for name in _walk(root, folder)]
    _at_least_one(items, root)
    return {"": Source(f"imagefolder {root}", items, tuple(classes), functools.partial(_read_file, root))}


def list_flat(root: Path | None) -> dict[str, Source]:
    """ROOT/**/<image> without labels."""
    root = _existing(root, "flat")
    items = [Item(name, None) for name in _walk(root, "")]
    _at_least_one(items, root)
    return {"": Source(f"flat {root}", items, (), functools.partial(_read_file, root))}


def list_digits(root: Path | None) -> dict[str, Source]:
    """scikit-learn's 1,797 handwritten digits, which need no download. A fifth of each class becomes val."""
    if root is not None:
        raise ConfigError("--source digits comes with scikit-learn: leave out --root")
    labels = _digits()[1]
    order = [np.flatnonzero(labels == digit) for digit in range(10)]
    held_out = {int(row) for rows in order for row in rows[: round(len(rows) * DIGITS_HELD_OUT)]}
    items = [Item(f"digit {row}", int(label)) for row, label in enumerate(labels)]
    classes = tuple(str(digit) for digit in range(10))
    return {
        "train": Source(
            "digits train",
            [item for row, item in enumerate(items) if row not in held_out],
            classes,
            _read_digit,
        ),
        "val": Source(
            "digits val", [item for row, item in enumerate(items) if row in held_out], classes, _read_digit
        ),
    }


SOURCES: dict[str, Callable[[Path | None], dict[str, Source]]] = {
    "imagefolder": list_imagefolder,
    "flat": list_flat,
    "digits": list_digits,
}


def _existing(root: Path | None, source: str) -> Path:
    if root is None:
        raise ConfigError(f"--source {source} needs --root, the folder that holds the images")
    if not root.is_dir():
        raise ConfigError(f"--root {root} is not a folder")
    return root


def _at_least_one(items: Sequence[Item], root: Path) -> None:
    if not items:
        raise ConfigError(f"--root {root} holds no image file ({', '.join(IMAGE_ENDINGS)})")


def _walk(root: Path, folder: str) -> Iterator[str]:
    """Image files below root/folder, relative to root, in an order that depends on their names alone."""
    with os.scandir(root / folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in found:
        inner = f"{folder}/{name}" if folder else name
        if is_folder:
            yield from _walk(root, inner)
        elif name.lower().endswith(IMAGE_ENDINGS):
            yield inner


def _read_file(root: Path, item: Item) -> bytes:
    return (root / item.name).read_bytes()


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a second of import that other sources need not pay

    bunch = load_digits()
    return bunch.images, bunch.target


def _read_digit(item: Item) -> bytes:
    pixels = _digits()[0][int(item.name.split()[1])]  # 0..16
    grey = np.minimum(pixels * 16, 255).astype(np.uint8)
    image = Image.fromarray(grey).resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
