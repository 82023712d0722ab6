"""An existing WebDataset: tars of samples, from whomever. Headers are verified, nothing is unpickled."""

import functools
from collections.abc import Iterator, Mapping
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import INDEX_NAME, read_index
from cmae_scale.data.tar import list_members
from cmae_scale.data.tar_headers import Member
from data_prep.listing import Item, Listing
from data_prep.sources.members import MAX_IMAGE_BYTES, open_archive, read_member
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, number_classes

LABEL_ENDING = "cls"
MAX_LABEL_BYTES = 64
FAULTS = (
    "sample has no image (its members must stand side by side)",
    "sample has two images",
    "sample has a label that is not a class number",
    f"sample has an image of more than {MAX_IMAGE_BYTES >> 20} MiB",
)
NO_IMAGE, TWO_IMAGES, BAD_LABEL, HUGE = range(len(FAULTS))


def list_webdataset(request: SourceRequest) -> dict[str, Source]:
    """ROOT/*.tar, or one tar, or a pattern like shards/train-*.tar. Labels are the .cls members, if any.

    Samples get new keys. Members other than images and labels are left behind.
    """
    if request.root is None:
        raise ConfigError("--source webdataset needs --root, the folder that holds the tars")
    paths = _find_tars(request.root)
    counts: Mapping[str, int] = {}
    classes = None
    if request.root.is_dir() and (request.root / INDEX_NAME).exists():
        index = read_index(request.root)
        paths = [index.path(number) for number in range(len(index.shards))]
        counts = {shard.name: shard.samples for shard in index.shards}
        classes = index.classes
    items = Listing(
        item for number, path in enumerate(paths) for item in _list_tar(number, path, counts.get(path.name))
    )
    if not items:
        raise ConfigError(f"the tars of --root {request.root} hold no sample")
    read = functools.partial(_read_sample, tuple(str(path) for path in paths))
    title = f"webdataset {request.root}"
    return {"": Source(title, items, number_classes(items) if classes is None else classes, read)}


def _find_tars(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    pattern = root / "*.tar" if root.is_dir() else root
    paths = sorted(pattern.parent.glob(pattern.name))
    if not paths:
        raise ConfigError(
            f"--root {root} holds no tar: name a folder of tars, a tar, or a pattern like {root}/a-*.tar"
        )
    return paths


def _list_tar(number: int, path: Path, expected: int | None) -> Iterator[Item]:
    count = 0
    with open_archive(str(path)) as file:
        for key, members in groupby(list_members(file, name=str(path)), key=attrgetter("key")):
            item = _read_item(file, f"{path.name}/{key}", number=number, members=members)
            if item is not None:
                count += 1
                yield item
    if expected is not None and count != expected:
        raise DataError(f"{path} holds {count} samples, its {INDEX_NAME} says {expected}: copy it again")


def _read_item(file: BinaryIO, name: str, *, number: int, members: Iterator[Member]) -> Item | None:
    """The sample, with a fault as its place if it cannot be used; None if the group is no sample at all."""
    images, label, fault, is_sample = [], None, None, False
    for member in members:
        if f".{member.ending}" in IMAGE_ENDINGS:
            images.append(member)
        elif member.ending == LABEL_ENDING:
            is_sample = True
            file.seek(member.data)
            text = file.read(min(member.size, MAX_LABEL_BYTES)).strip()
            label = int(text) if text.isdigit() and len(text) < 10 else None
            fault = BAD_LABEL if label is None else fault
    if not images and not is_sample:
        return None  # a file beside the samples, or one that had its image left out
    if len(images) != 1:
        fault = TWO_IMAGES if images else NO_IMAGE
    elif images[0].size > MAX_IMAGE_BYTES:
        fault = HUGE
    place = (fault, 0, -1) if fault is not None else (number, images[0].data, images[0].size)
    return Item(name, label, place)


def _read_sample(paths: tuple[str, ...], item: Item) -> bytes:
    if item.place[2] < 0:
        raise DataError(FAULTS[item.place[0]])
    return read_member(paths, item)
