"""What a source holds, as a sequence that takes no memory: the list of a billion images is no small thing."""

import hashlib
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np

NOWHERE = (0, 0, 0)
HEAD = struct.Struct("<qqqq")  # label (-1: none), place
OFFSET = struct.Struct("<Q")
BUFFER_BYTES = 1 << 20


class Item(NamedTuple):
    """One image. `name` is unique within its source and says to a user which one it is.

    `place` says where to find it; what the three numbers mean is between a source's listing and its reader.
    """

    name: str
    label: int | None
    place: tuple[int, int, int] = NOWHERE


class Listing(Sequence[Item]):
    """Items kept in two temporary files: their records, and where each record begins.

    The files have no name (in TMPDIR), so nothing is left behind however the process ends. `digest` is the
    SHA-256 of all records: two listings with the same digest are the same. `labels` counts the items of each.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._records = tempfile.TemporaryFile(buffering=BUFFER_BYTES)  # noqa: SIM115 -- lives as long as this
        self._offsets = tempfile.TemporaryFile(buffering=BUFFER_BYTES)  # noqa: SIM115
        self.labels: Counter[int | None] = Counter()
        digest = hashlib.sha256()
        count = offset = 0
        for count, item in enumerate(items, start=1):  # noqa: B007 -- used after the loop
            record = _pack(item)
            self.labels[item.label] += 1
            digest.update(b"%d:%b" % (len(record), record))
            self._records.write(record)
            self._offsets.write(OFFSET.pack(offset))
            offset += len(record)
        self._offsets.write(OFFSET.pack(offset))
        self._records.flush()
        self._offsets.flush()
        self._count = count
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        raw = os.pread(self._offsets.fileno(), 2 * OFFSET.size, number * OFFSET.size)
        begin, end = struct.unpack("<QQ", raw)
        return _unpack(os.pread(self._records.fileno(), end - begin, begin))

    def __iter__(self) -> Iterator[Item]:
        step = BUFFER_BYTES // OFFSET.size
        for first in range(0, len(self), step):
            raw = os.pread(self._offsets.fileno(), (step + 1) * OFFSET.size, first * OFFSET.size)
            offsets = np.frombuffer(raw, dtype="<u8").tolist()
            records = os.pread(self._records.fileno(), offsets[-1] - offsets[0], offsets[0])
            for begin, end in pairwise(offsets):
                yield _unpack(records[begin - offsets[0] : end - offsets[0]])


def _pack(item: Item) -> bytes:
    label = -1 if item.label is None else item.label
    return HEAD.pack(label, *item.place) + item.name.encode(errors="surrogateescape")


def _unpack(record: bytes) -> Item:
    label, *place = HEAD.unpack_from(record)
    name = record[HEAD.size :].decode(errors="surrogateescape")
    return Item(name, None if label < 0 else label, (place[0], place[1], place[2]))
