"""Samples of a shard, front to back, read so strictly that no damage can pass for a shorter shard.

The format is WebDataset's: `<key>.jpg` (or another ending of an image format) and `<key>.cls` side by side in
an uncompressed tar. The stock reader ends quietly at a bad header and hands out half samples at a cut; here
every header is verified, the file must have the size and the number of samples that the index says, and an
archive must end as one.
Nothing is ever unpickled, extracted or followed: members are bytes, and only images and labels are looked at.

The key of a sample is what is before the first dot of its members' names, as webdataset has it. Where names
are `cam.008.jpg`, `cam.009.jpg`, with a dot in each, people mean the part before the last dot: `by_stem`.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cmae_scale.core.errors import DataError
from cmae_scale.data.image_formats import IMAGE_ENDINGS
from cmae_scale.data.index import REMEDY, ShardInfo
from cmae_scale.data.locations import show_location
from cmae_scale.data.storage import LOCAL, Storage
from cmae_scale.data.tar_headers import (
    BLOCK,
    MAX_SMALL_BYTES,
    READ_BYTES,
    Damage,
    File,
    ForeignFileError,
    Member,
    read_data,
    walk_members,
)

USUAL_ENDINGS = frozenset(("jpg", "jpeg", "png", "webp"))
LABEL_ENDING = "cls"
MAX_IMAGE_BYTES = 1 << 28  # a forged size must not fill the memory
MAX_LABEL = 2**63 - 1  # what batches hold
COPY_AGAIN = "copy it again"


class RawSample(NamedTuple):
    """One image, still compressed, and its class if the shard says one."""

    key: str
    image: bytes
    label: int | None


def read_samples(
    location: str | Path,
    *,
    first: int,
    count: int,
    expected: ShardInfo,
    storage: Storage = LOCAL,
    offsets: Sequence[int] | None = None,
    by_stem: bool = False,
) -> Iterator[RawSample]:
    """Samples number `first` to `first + count` of a shard.

    `offsets` say where each sample begins and the last one ends; without them those before are stepped over
    by their headers. Raises DataError, naming the shard and what is wrong, at any damage up to there; when
    the range ends where the shard does, also at a sample too few or too many. Flipped bytes inside an image
    are not seen here: the decoder notices some, check_shards notices all.
    """
    assert first >= 0
    assert 0 < count <= expected.samples - first
    ends = first + count == expected.samples
    end = None if ends or offsets is None else offsets[first + count]
    try:
        with _open(storage, str(location), expected, end=end) as raw:
            start = _find_sample(raw, first, by_stem=by_stem) if offsets is None else offsets[first]
            with io.BufferedReader(raw, READ_BYTES) as file:
                members = walk_members(file, start, end=end)
                yield from _take(group_members(members, by_stem=by_stem), file, count=count, ends=ends)
    except Damage as damage:
        name = f"{show_location(str(location))} ({expected.samples} samples)"
        raise _as_error(damage, name=name, remedy=REMEDY) from None


def find_offsets(file: BinaryIO, *, name: str, by_stem: bool = False) -> list[int]:
    """Where each sample of an open tar begins and the last one ends, by the headers alone.

    DataError at any damage that they show, for which `name` says which archive it is.
    """
    offsets, end = [], 0
    for _, members in group_members(list_members(file, name=name), by_stem=by_stem):
        own = list(members)
        offsets.append(own[0].header)
        end = own[-1].data + (own[-1].size + BLOCK - 1) // BLOCK * BLOCK
    return [*offsets, end] if offsets else []


def list_members(file: BinaryIO, *, name: str) -> Iterator[Member]:
    """Every plain file of an open tar, in order, by its headers alone.

    For archives without an index: it must still end as one. DataError at any damage, for which `name` says
    which archive it is.
    """
    try:
        yield from walk_members(file, 0)
    except Damage as damage:
        raise _as_error(damage, name=name, remedy=COPY_AGAIN) from None


def group_members(members: Iterable[Member], *, by_stem: bool) -> Iterator[tuple[str, Iterator[Member]]]:
    """Neighbours that belong to one sample, with its key. Files without an ending belong to none."""
    own = (member for member in members if member.ending)
    return groupby(map(_name_by_stem, own) if by_stem else own, key=attrgetter("key"))


def split_members(members: Iterable[Member]) -> Iterator[tuple[str, list[Member]]]:
    """The samples of a tar that no index describes, with their keys.

    What is before the first dot is one sample's key as soon as one of its members has nothing but an ending
    after that dot ("7.cls", "7.rgb.jpg"); where all have more, each stem is a key.
    """
    for key, group in group_members(members, by_stem=False):
        own = list(group)
        if any("." not in member.ending for member in own):
            yield key, own
        else:
            yield from ((stem, list(part)) for stem, part in group_members(own, by_stem=True))


def rank_image(member: Member) -> int:
    """Which of several members is a sample's image: the one of highest rank. 0: no image at all.

    People store others beside a JPEG, PNG or WebP (previews, depth as TIFF), and name what is not the image
    itself `key.mask.png`.
    """
    ending = member.ending.rpartition(".")[2]
    if ending not in IMAGE_ENDINGS:
        return 0
    return 1 + (ending in USUAL_ENDINGS) + 2 * (ending == member.ending)


def parse_label(text: bytes) -> int | None:
    """The class number in a .cls member; None if it is empty or -1. ValueError if it is anything else."""
    text = text.strip()
    if text in (b"", b"-1"):
        return None
    if not text.isdigit() or len(text) > len(str(MAX_LABEL)) or int(text) > MAX_LABEL:
        raise ValueError("not a class number")
    return int(text)


def _name_by_stem(member: Member) -> Member:
    return member._replace(key=member.stem, ending=member.ending.rpartition(".")[2])


def _as_error(damage: Damage, *, name: str, remedy: str) -> DataError:
    if isinstance(damage, ForeignFileError):
        return DataError(f"{name} is no tar archive but {damage}")
    return DataError(f"{name} is damaged: {damage}: {remedy}")


def _open(storage: Storage, location: str, expected: ShardInfo, *, end: int | None) -> io.RawIOBase:
    try:
        raw = storage.open_file(location, max_bytes=expected.bytes, end=end, version=expected.sha256)
    except OSError as error:
        raise Damage(f"it cannot be opened ({error.strerror})") from None
    try:
        size = raw.seek(0, io.SEEK_END)
    except OSError:
        return raw  # a command, or a server that tells no length: its end is seen when it is reached
    if size != expected.bytes:
        raw.close()
        raise Damage(f"it has {size} bytes where the index says {expected.bytes}")
    return raw


def _find_sample(raw: io.RawIOBase, number: int, *, by_stem: bool) -> int:
    """Where the headers of sample `number` begin. Costs a read of 512 bytes for every member before it."""
    if number == 0:
        return 0
    for passed, (_, members) in enumerate(group_members(walk_members(raw, 0), by_stem=by_stem)):
        if passed == number:
            return next(members).header
    raise Damage(f"it ends before sample {number}")


def _take(
    samples: Iterator[tuple[str, Iterator[Member]]], file: File, *, count: int, ends: bool
) -> Iterator[RawSample]:
    """The first `count` samples; `ends` says that the archive must end after them."""
    for taken in range(count):
        key, own = next(samples, (None, None))
        if key is None or own is None:
            raise Damage(f"it ends {count - taken} samples early")
        yield _read_sample(file, key, own)
    if ends and next(samples, None) is not None:
        raise Damage("it holds more samples than the index says")


def _read_sample(file: File, key: str, members: Iterator[Member]) -> RawSample:
    image: bytes | None = None
    label: int | None = None
    best, is_alone = 0, True  # rank of the image so far, and whether no other has the same
    for member in members:
        if rank := rank_image(member):
            is_alone = rank > best or (is_alone and rank < best)
            if rank > best:
                image, best = read_data(file, member.size, limit=MAX_IMAGE_BYTES), rank
        elif member.ending == LABEL_ENDING:
            text = read_data(file, member.size, limit=MAX_SMALL_BYTES)
            try:
                label = parse_label(text)
            except ValueError:
                raise Damage(f"the label of sample '{key}' is {text[:20]!r}, not a class number") from None
    if not is_alone:
        raise Damage(f"sample '{key}' has two images")
    if image is None:
        raise Damage(f"sample '{key}' has no image (members of a sample must stand side by side)")
    return RawSample(key, image, label)
