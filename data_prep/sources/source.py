"""What a source is: a list of images, and a function that gives the bytes of one."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cmae_scale.core.errors import ConfigError
from cmae_scale.data import image_formats
from data_prep.listing import Item, Listing
from data_prep.unlisted import Unlisted

IMAGE_ENDINGS = tuple(sorted(f".{ending}" for ending in image_formats.IMAGE_ENDINGS))
HEAD_BYTES = 512  # tell what a file is

Read = Callable[[Item], bytes]


@dataclass(frozen=True)
class SourceRequest:
    """What the user says about a source. `root` is a folder or a file, as the kind of source has it.

    With `no_labels` no label is even looked at. `encoding` is that of names and tables that are not UTF-8.
    With `merge_splits`, names that say a split say nothing.
    """

    root: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    no_labels: bool = False
    encoding: str | None = None
    merge_splits: bool = False


@dataclass(frozen=True)
class Source:
    """Images and where their bytes come from. `read` must be picklable: it runs in other processes.

    `unlisted` are the files that it found and does not take, `notes` what it has decided for its user.

    Where an image cannot be read by itself, only among hundreds of others, `stage` first copies those that
    are needed into a scratch folder, in one pass through the source, and returns the `read` to use.
    """

    title: str
    items: Listing
    classes: tuple[str, ...]
    read: Read
    stage: Callable[[Path, Iterator[Item]], Read] | None = None
    unlisted: Unlisted = field(default_factory=Unlisted)
    notes: tuple[str, ...] = ()


def existing_folder(request: SourceRequest, source: str) -> Path:
    """The root, if it is a folder."""
    if request.root is None:
        raise ConfigError(f"--source {source} needs --root, the folder that holds the images")
    if not request.root.is_dir():
        raise ConfigError(say_kind(request.root) or f"--root {request.root} is not a folder")
    return request.root


def show_path(path: Path) -> str:
    """A path as text, also where it is not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


def say_kind(path: Path) -> str | None:
    """A sentence on a file that is something else than it is taken for; None if nothing is known of it."""
    try:
        with path.open("rb") as file:
            kind = image_formats.name_other(file.read(HEAD_BYTES))
    except OSError:
        return None
    return None if kind is None else f"{show_path(path)} is {kind}"


def find_below(root: Path, *patterns: str) -> Path | None:
    """The first folder up to two below `root` with a file that fits: what to name when `root` has none."""
    for pattern in patterns:
        for depth in ("*", "*/*"):
            for found in sorted(root.glob(f"{depth}/{pattern}")):
                return found.parent
    return None
