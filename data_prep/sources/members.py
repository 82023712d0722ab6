"""Members of tars, read where they lie: nothing is unpacked, nothing in a tar becomes a path."""

import functools
import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

from cmae_scale.core.errors import ConfigError, DataError
from data_prep.listing import Item

OPEN_FILES = 128  # kept open by each process
MAX_IMAGE_BYTES = 1 << 28  # a forged size must not fill the memory


class Window(io.RawIOBase):
    """A part of a file as a file of its own: a tar inside of a tar."""

    def __init__(self, file: BinaryIO, *, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        """As a file says it."""
        return True

    def seekable(self) -> bool:
        """As a file says it."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position counted from the window's beginning (or from where `whence` says)."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what follows; the number of bytes, 0 at the window's end."""
        size = max(0, min(len(buffer), self._size - self._place))
        data = os.pread(self._file.fileno(), size, self._offset + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def read_member(paths: Sequence[str], item: Item) -> bytes:
    """The bytes of an item whose place is (number of the file in `paths`, offset, size)."""
    number, offset, size = item.place
    data = os.pread(_open(paths[number]).fileno(), size, offset)
    if len(data) < size:
        raise DataError("the file that holds it ends before it does")
    return data


def open_archive(path: str) -> BinaryIO:
    """The file, unbuffered: headers are few bytes far apart."""
    try:
        return io.FileIO(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened ({error.strerror})") from None


@functools.lru_cache(maxsize=OPEN_FILES)
def _open(path: str) -> BinaryIO:
    return io.FileIO(path)  # closed when the cache forgets it
