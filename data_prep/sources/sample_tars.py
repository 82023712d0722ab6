"""An existing WebDataset: tars of samples, from whomever. Headers are verified, nothing is unpickled."""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import INDEX_NAME, ShardIndex, read_index
from cmae_scale.data.tar import LABEL_ENDING, list_members, parse_label, rank_image, split_members
from cmae_scale.data.tar_headers import Member
from data_prep.listing import Item, Listing
from data_prep.sources.labels import number_labels
from data_prep.sources.members import MAX_IMAGE_BYTES, open_archive, read_member
from data_prep.sources.source import Source, SourceRequest, find_below, show_path
from data_prep.sources.splits import find_role, group_files
from data_prep.unlisted import Unlisted, say_other_file

MAX_LABEL_BYTES = 64
FAULTS = (
    "sample has no image (its members must stand side by side)",
    "sample has two images",
    "sample has a label that is not a class number (--no_labels takes the image without)",
    f"sample has an image of more than {MAX_IMAGE_BYTES >> 20} MiB",
    "sample has a label that no class of its index has (--no_labels takes the image without)",
)
NO_IMAGE, TWO_IMAGES, BAD_LABEL, HUGE, NO_CLASS = range(len(FAULTS))
NO_SAMPLE = "beside the samples of a tar, with no image of its own"


def list_webdataset(request: SourceRequest) -> dict[str, Source]:
    """ROOT/*.tar, or one tar, or a pattern like shards/train-*.tar. Labels are the .cls members, if any.

    Where there are none, the folders in the tars are the classes. Samples get new keys. Members other than
    images and labels are left behind, and counted.
    """
    if request.root is None:
        raise ConfigError("--source webdataset needs --root, the folder that holds the tars")
    index = None
    if request.root.is_dir() and (request.root / INDEX_NAME).exists():
        index = read_index(request.root)
        splits = {"": [index.path(number) for number in range(len(index.shards))]}
    else:
        paths = _find_tars(request.root)
        splits = {"": paths} if request.merge_splits else group_files(paths)
    has_labels = not request.no_labels and (index is None or bool(index.classes))
    listed = {split: _Tars(paths, index=index, has_labels=has_labels) for split, paths in splits.items()}
    listings = {split: Listing(tars.list_items()) for split, tars in listed.items()}
    for split, items in listings.items():
        if not items:
            raise ConfigError(f"the tars of --root {request.root} {split} hold no sample")
    classes, note = (index.classes, ()) if index is not None else _number(listings, request)
    return {
        split: Source(
            f"webdataset {show_path(request.root)} {split}".strip(),
            listings[split],
            classes,
            functools.partial(_read_sample, tuple(str(path) for path in tars.paths)),
            unlisted=tars.unlisted,
            notes=(*note, *tars.say_left_behind()),
        )
        for split, tars in listed.items()
    }


def _find_tars(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    pattern = root / "*.tar" if root.is_dir() else root
    paths = sorted(pattern.parent.glob(pattern.name))
    if not paths:
        remedy = f"name a folder of tars, a tar, or a pattern like {root}/a-*.tar"
        if next(root.glob("*.t*gz"), None) or next(root.glob("*.tar.*"), None):
            remedy = "unpack those that are compressed"
        elif (folder := find_below(root, "*.tar")) is not None:
            remedy = f"write --root {folder}"
        raise ConfigError(f"--root {root} holds no *.tar: {remedy}")
    return paths


def _number(listings: dict[str, Listing], request: SourceRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of all splits and what to tell of them. Changes `listings` where labels change."""
    labels = {label for items in listings.values() for label in items.labels}
    place = f"--root {request.root}"
    if labels != {None}:
        classes, numbers = number_labels(labels, place=place)
        changed = any(numbers[label] != label for label in labels)
        for split, items in listings.items() if changed else ():
            listings[split] = Listing(item._replace(label=numbers[item.label]) for item in items)
        return classes, ()
    if request.no_labels:
        return (), ()
    folders = {_read_folder(item) for items in listings.values() for item in items}
    if len(folders) < 2 or "" in folders or any(map(find_role, folders)):
        return (), ("no labels: the samples have no .cls member and lie in no class folders",)
    classes, by_name = number_labels(folders, place=place)
    for split, items in listings.items():
        listings[split] = Listing(item._replace(label=by_name[_read_folder(item)]) for item in items)
    return classes, (f"labels: the folders in the tars, {len(classes):,} classes",)


def _read_folder(item: Item) -> str:
    """The folder of a sample within its tar; "" if it has none."""
    return item.name.partition("/")[2].rpartition("/")[0].rpartition("/")[2]


@dataclass
class _Tars:
    """The tars of one split while they are listed, and what is in them besides samples."""

    paths: Sequence[Path]
    index: ShardIndex | None
    has_labels: bool
    unlisted: Unlisted = field(default_factory=Unlisted)
    left_behind: Counter[str] = field(default_factory=Counter)

    def list_items(self) -> Iterator[Item]:
        """Every sample; one that cannot be used has a fault as its place."""
        expected: Mapping[str, int] = {}
        if self.index is not None:
            expected = {shard.name: shard.samples for shard in self.index.shards}
        for number, path in enumerate(self.paths):
            count = 0
            for item in self._list_tar(number, path):
                count += 1
                yield item
            if count != expected.get(path.name, count):
                said = f"its {INDEX_NAME} says {expected[path.name]}"
                raise DataError(f"{path} holds {count} samples, {said}: copy it again")

    def say_left_behind(self) -> Iterator[str]:
        """A line on the members that stood beside an image."""
        if self.left_behind:
            counts = ", ".join(f"{count:,} .{ending}" for ending, count in self.left_behind.most_common())
            yield f"left behind: members beside the images ({counts})"

    def _list_tar(self, number: int, path: Path) -> Iterator[Item]:
        with open_archive(str(path)) as file:
            members = self._pass_named(list_members(file, name=str(path)), path.name)
            for key, own in split_members(members):
                images = sorted(filter(rank_image, own), key=rank_image)
                labels = [member for member in own if member.ending == LABEL_ENDING]
                if not images and not labels:
                    for member in own:
                        self.unlisted.add(f"{path.name}/{member.key}.{member.ending}", NO_SAMPLE)
                    continue
                used = [*images[-1:], *labels]
                self.left_behind.update(member.ending for member in own if member not in used)
                label, fault = self._read_label(file, labels)
                fault = _find_fault(images) if fault is None else fault
                place = (number, images[-1].data, images[-1].size) if fault is None else (fault, 0, -1)
                yield Item(f"{path.name}/{key}", label, place)

    def _pass_named(self, members: Iterator[Member], tar: str) -> Iterator[Member]:
        """The members whose names have an ending."""
        for member in members:
            if member.ending:
                yield member
            else:
                self.unlisted.add(f"{tar}/{member.key}", say_other_file(member.key))

    def _read_label(self, file: BinaryIO, labels: Sequence[Member]) -> tuple[int | None, int | None]:
        """The label of a sample and what is wrong with it."""
        if not labels or not self.has_labels:
            return None, None
        file.seek(labels[-1].data)
        try:
            label = parse_label(file.read(min(labels[-1].size, MAX_LABEL_BYTES)))
        except ValueError:
            return None, BAD_LABEL
        if self.index is not None and label is not None and label >= len(self.index.classes):
            return None, NO_CLASS
        return label, None


def _find_fault(images: Sequence[Member]) -> int | None:
    """What is wrong with the images of a sample, the best of which comes last."""
    if not images:
        return NO_IMAGE
    if len(images) > 1 and rank_image(images[-1]) == rank_image(images[-2]):
        return TWO_IMAGES
    return HUGE if images[-1].size > MAX_IMAGE_BYTES else None


def _read_sample(paths: tuple[str, ...], item: Item) -> bytes:
    if item.place[2] < 0:
        raise DataError(FAULTS[item.place[0]])
    return read_member(paths, item)
