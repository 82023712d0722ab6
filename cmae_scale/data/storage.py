"""One way to open a shard, wherever it lies: a path, an address, or (if allowed) a command's output."""

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.cache import ChunkCache
from cmae_scale.data.command import CommandFile
from cmae_scale.data.index import measure_shard
from cmae_scale.data.locations import COMMAND, is_pattern, read_scheme, show_location
from cmae_scale.data.remote import Remote

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_TEXT_BYTES = 1 << 30  # of an index.json: ten million shards
TEXT_CHUNK_BYTES = 1 << 22


class Storage(Protocol):
    """Files of one kind of storage. Whatever goes wrong is a DataError or an OSError."""

    def open_file(
        self, location: str, *, max_bytes: int, end: int | None = None, version: str | None = None
    ) -> io.RawIOBase:
        """A file to read front to back and to seek in; nothing from byte `end` on will be asked for.

        A server that tells no length may send `max_bytes` at most. `version` names the content (a hash), so
        that a cache can tell it from what was there before.
        """

    def measure(self, locations: Sequence[str]) -> list[int | None]:
        """Size of each in bytes; None where it cannot be told before reading. DataError if one is missing."""

    def find(self, pattern: str) -> list[str]:
        """Locations that match a pattern with *, ? and [], sorted."""

    def __hash__(self) -> int:
        """What was read through a storage may be kept under it."""


class LocalStorage:
    """Files of this machine, or of a file system that is mounted on it.

    Who reads a mount whose server is gone waits for ever: the watchdog of a run names it.
    """

    def open_file(
        self, location: str, *, max_bytes: int, end: int | None = None, version: str | None = None
    ) -> io.RawIOBase:
        """The file itself."""
        return _LocalFile(location, end=end)

    def measure(self, locations: Sequence[str]) -> list[int | None]:
        """From the file system's tables."""
        return [measure_shard(location) for location in locations]

    def find(self, pattern: str) -> list[str]:
        """As a shell would."""
        return sorted(glob.glob(pattern))  # noqa: PTH207 -- Path.glob takes no root


LOCAL = LocalStorage()


class CommandStorage:
    """What commands write to their output: `pipe:ssh host cat /data/train/{name}`."""

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def open_file(
        self, location: str, *, max_bytes: int, end: int | None = None, version: str | None = None
    ) -> io.RawIOBase:
        """The output of the command, started when it is first read."""
        return CommandFile(location, timeout_s=self.timeout_s, max_bytes=max_bytes)

    def measure(self, locations: Sequence[str]) -> list[int | None]:
        """Unknown until it was read."""
        return [None for _ in locations]

    def find(self, pattern: str) -> list[str]:
        """A command is no pattern."""
        return [pattern]


def open_storage(location: str, data: DataConfig) -> Storage:
    """What reads `location`. ConfigError for schemes we do not read, and a command that is not allowed."""
    match read_scheme(location):
        case "":
            return LOCAL
        case "pipe":
            if not data.allow_commands:
                raise ConfigError(
                    f"{show_location(location)} would run a command: set cmae.data.allow_commands "
                    "to true if you trust this run file"
                )
            return CommandStorage(timeout_s=data.read_timeout_s)
        case scheme:
            cache = (
                ChunkCache(Path(data.cache), max_bytes=int(data.cache_gib * 2**30)) if data.cache else None
            )
            return Remote(scheme, timeout_s=data.read_timeout_s, retries=data.read_retries, cache=cache)


def read_text(storage: Storage, location: str) -> bytes | None:
    """A whole small file, such as an index; None if there is none. DataError if it is absurdly large."""
    text = bytearray()
    try:
        with storage.open_file(location, max_bytes=MAX_TEXT_BYTES) as file:
            while len(text) <= MAX_TEXT_BYTES and (part := file.read(TEXT_CHUNK_BYTES)):
                text += part
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{show_location(location)} cannot be read ({error.strerror or type(error).__name__})"
        ) from None
    if len(text) > MAX_TEXT_BYTES:
        raise DataError(f"{show_location(location)} has more than {MAX_TEXT_BYTES} bytes: it is no index")
    return bytes(text)


def find_locations(storage: Storage, location: str) -> list[str]:
    """What a pattern matches; a location that is no pattern is itself. DataError when nothing matches."""
    if read_scheme(location) == COMMAND or not is_pattern(location):
        return [location]
    found = storage.find(location)
    if not found:
        raise DataError(f"nothing matches {show_location(location)}: look at the pattern in cmae.data.shards")
    return found


class _LocalFile(io.FileIO):
    """A file whose buffered readers do not read on beyond byte `end`."""

    def __init__(self, location: str, *, end: int | None) -> None:
        super().__init__(location)
        self._end = end

    def readinto(self, buffer: "WriteableBuffer", /) -> int | None:
        """As any file does, up to `end`."""
        view = memoryview(buffer)
        if self._end is not None:
            view = view[: max(0, self._end - self.tell())]
        return super().readinto(view)
