"""Samples of a shard, front to back, read so strictly that no damage can pass for a shorter shard.

The format is WebDataset's: `<key>.jpg` (or another ending of an image format) and `<key>.cls` side by side in
an uncompressed tar. The stock reader ends quietly at a bad header and hands out half samples at a cut; here
every header is verified, the file must have the size and the number of samples that the index says, and an
archive must end as one.
Nothing is ever unpickled, extracted or followed: members are bytes, and only images and labels are looked at.
"""

import io
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cmae_scale.core.errors import DataError
from cmae_scale.data.image_formats import IMAGE_ENDINGS
from cmae_scale.data.index import REMEDY, ShardInfo
from cmae_scale.data.places import show_place
from cmae_scale.data.storage import LOCAL, Storage

BLOCK = 512  # Source: POSIX.1-2001, pax and ustar interchange format; so are the places of fields below
END = bytes(BLOCK)
CHECKSUM = slice(148, 156)
READ_BYTES = 1 << 19  # of one read call; each stream holds one such buffer

USUAL_ENDINGS = frozenset(("jpg", "jpeg", "png", "webp"))
LABEL_ENDING = "cls"
MAX_IMAGE_BYTES = 1 << 28  # a forged size must not fill the memory
MAX_SMALL_BYTES = 1 << 16  # the same for labels and long names
SAMPLE_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # Source: webdataset tariterators.base_plus_ext

File = BinaryIO | io.RawIOBase | io.BufferedReader


class RawSample(NamedTuple):
    """One image, still compressed, and its class if the shard says one."""

    key: str
    image: bytes
    label: int | None


class Member(NamedTuple):
    """One file of the archive; `header` and `data` are the positions where they begin in the tar."""

    key: str
    ending: str
    size: int
    header: int
    data: int


class _Damage(Exception):  # noqa: N818 -- becomes a DataError where the shard's name is known
    """What is wrong with the archive, as a part of a sentence."""


def read_samples(
    place: str | Path,
    *,
    first: int,
    count: int,
    expected: ShardInfo,
    storage: Storage = LOCAL,
    offsets: Sequence[int] | None = None,
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
        with _open(storage, str(place), expected, end=end) as raw:
            start = _find_sample(raw, first) if offsets is None else offsets[first]
            with io.BufferedReader(raw, READ_BYTES) as file:
                yield from _take(_walk(file, start, end=end), file, count=count, ends=ends)
    except _Damage as damage:
        shown = show_place(str(place))
        raise DataError(f"{shown} ({expected.samples} samples) is damaged: {damage}: {REMEDY}") from None


def rank_image(ending: str) -> int:
    """Which of several members is a sample's image: the one of highest rank. 0: no image at all.

    People store others beside a JPEG, PNG or WebP (previews, depth as TIFF), but no two of those three.
    """
    return 2 if ending in USUAL_ENDINGS else int(ending in IMAGE_ENDINGS)


def find_offsets(file: BinaryIO, *, name: str) -> list[int]:
    """Where each sample of an open tar begins and the last one ends, by the headers alone.

    DataError at any damage that they show, for which `name` says which archive it is.
    """
    offsets, last = [], None
    try:
        for member in _walk(file, 0):
            if member.key != last:
                offsets.append(member.header)
            last, end = member.key, member.data + (member.size + BLOCK - 1) // BLOCK * BLOCK
    except _Damage as damage:
        raise DataError(f"{name} is damaged: {damage}: copy it again") from None
    return [*offsets, end] if offsets else []


def list_members(file: BinaryIO, *, name: str) -> Iterator[Member]:
    """Every plain file of an open tar that has an ending, in order, by its headers alone.

    For archives without an index: it must still end as one. DataError at any damage, for which `name` says
    which archive it is.
    """
    try:
        yield from _walk(file, 0)
    except _Damage as damage:
        raise DataError(f"{name} is damaged: {damage}: copy it again") from None


def _open(storage: Storage, place: str, expected: ShardInfo, *, end: int | None) -> io.RawIOBase:
    try:
        raw = storage.open_file(place, end=end, version=expected.sha256)
    except OSError as error:
        raise _Damage(f"it cannot be opened ({error.strerror})") from None
    try:
        size = raw.seek(0, io.SEEK_END)
    except OSError:
        return raw  # a command, or a server that tells no length: its end is seen when it is reached
    if size != expected.bytes:
        raw.close()
        raise _Damage(f"it has {size} bytes where the index says {expected.bytes}")
    return raw


def _find_sample(raw: io.RawIOBase, number: int) -> int:
    """Where the headers of sample `number` begin. Costs a read of 512 bytes for every member before it."""
    if number == 0:
        return 0
    for passed, (_, members) in enumerate(groupby(_walk(raw, 0), key=attrgetter("key"))):
        if passed == number:
            return next(members).header
    raise _Damage(f"it ends before sample {number}")


def _take(members: Iterator[Member], file: File, *, count: int, ends: bool) -> Iterator[RawSample]:
    """The first `count` samples; `ends` says that the archive must end after them."""
    samples = groupby(members, key=attrgetter("key"))
    for taken in range(count):
        key, own = next(samples, (None, None))
        if key is None or own is None:
            raise _Damage(f"it ends {count - taken} samples early")
        yield _read_sample(file, key, own)
    if ends and next(samples, None) is not None:
        raise _Damage("it holds more samples than the index says")


def _read_sample(file: File, key: str, members: Iterator[Member]) -> RawSample:
    image: bytes | None = None
    label: int | None = None
    rank = 0  # of the image so far
    for member in members:
        if own_rank := rank_image(member.ending):
            if own_rank == rank:
                raise _Damage(f"sample '{key}' has two images")
            if own_rank > rank:
                image, rank = _read_data(file, member.size, limit=MAX_IMAGE_BYTES), own_rank
        elif member.ending == LABEL_ENDING:
            text = _read_data(file, member.size, limit=MAX_SMALL_BYTES)
            if not text.strip().isdigit():
                raise _Damage(f"the label of sample '{key}' is {text[:20]!r}, not a class number")
            label = int(text)
    if image is None:
        raise _Damage(f"sample '{key}' has no image (members of a sample must stand side by side)")
    return RawSample(key, image, label)


def _walk(file: File, position: int, *, end: int | None = None) -> Iterator[Member]:
    """Every file of the archive from `position` to a proper end, or to the header at `end`.

    The caller may read the data of each.
    """
    name = None  # of the next file, when an extended header gives it
    begin = position  # of the next file's first header
    while position != end:
        file.seek(position)
        header = _read(file, BLOCK)
        if header == END:
            return _check_end(file)
        size = _check_header(header, position)
        data = position + BLOCK
        position = data + (size + BLOCK - 1) // BLOCK * BLOCK
        match header[156:157]:  # the type of the member
            case b"0" | b"\0":
                sample = SAMPLE_NAME.fullmatch(_read_name(header) if name is None else name)
                if sample is not None:
                    yield Member(sample[1], sample[2].lower(), size, begin, data)
                name, begin = None, position
            case b"L":  # GNU: the data is the name of the next file
                name = _decode(_read_data(file, size, limit=MAX_SMALL_BYTES).rstrip(b"\0"))
            case b"x":  # pax: the data describes the next file
                name = _read_pax_name(_read_data(file, size, limit=MAX_SMALL_BYTES))
            case b"5" | b"g":  # folders, and descriptions of all files
                begin = position
            case other:
                raise _Damage(f"it holds a link or a device (type {other!r}), only plain files are read")


def sum_bytes(block: bytes | bytearray) -> int:
    """The sum of up to 512 bytes, in a seventh of the time that `sum` takes.

    Begun at 0, the low half of an Adler-32 is the sum modulo 65521, which 257 bytes can reach (RFC 1950).
    """
    return (zlib.adler32(block[:256], 0) & 0xFFFF) + (zlib.adler32(block[256:], 0) & 0xFFFF)


def _check_header(header: bytes, position: int) -> int:
    """The size of the member's data, once the header's own checksum is right."""
    if len(header) < BLOCK:
        raise _Damage(f"it ends at byte {position + len(header)} without an end-of-archive mark")
    written = header[CHECKSUM]
    checksum = sum_bytes(header) - sum(written) + 8 * ord(" ")
    if written != b"%06o\0 " % checksum:  # compared as it is written, so no flipped bit can pass
        raise _Damage(f"the header at byte {position} fails its checksum")
    try:
        return int(header[124:136].rstrip(b"\0 "), 8)
    except ValueError:
        raise _Damage(f"the header at byte {position} gives no size") from None


def _read_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # long names continue in the prefix field
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _decode(name)


def _read_pax_name(records: bytes) -> str | None:
    """The `path` among records of the form "<length> <key>=<value>\\n"; None if there is none."""
    name = None
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or not len(length) + 3 <= int(length) <= len(records):
            raise _Damage("it holds a malformed pax record")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"size":
            raise _Damage("it holds a file above 8 GB")
        if key == b"path":
            name = _decode(value)
        records = records[int(length) :]
    return name


def _read_data(file: File, size: int, *, limit: int) -> bytes:
    """The data of the member whose header was just read."""
    if size > limit:
        raise _Damage(f"it holds a member of {size} bytes, above the limit of {limit}")
    data = _read(file, size)
    if len(data) < size:
        raise _Damage(f"it ends inside of a member, {size - len(data)} bytes early")
    return data


def _read(file: File, size: int) -> bytes:
    """`size` bytes from where the file stands, or all that are left."""
    parts = []
    try:
        while size > 0 and (part := file.read(size)):  # an unbuffered file may give less than asked
            parts.append(part)
            size -= len(part)
    except OSError as error:
        raise _Damage(f"it cannot be read ({error.strerror or type(error).__name__})") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _decode(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise _Damage(f"it holds a file name that is not UTF-8 ({name!r})") from None


def _check_end(file: File) -> None:
    """An archive ends with two blocks of zeros, and nothing but zeros follows."""
    size = 0
    while rest := _read(file, READ_BYTES):
        size += len(rest)
        if rest.count(0) < len(rest):
            raise _Damage("an end-of-archive mark stands in its middle")
    if size < BLOCK:
        raise _Damage("its end-of-archive mark is cut off")
