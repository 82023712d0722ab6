"""The output of a command as a file. Only a run file can name one, and only if it allows commands."""

import io
import os
import select
import shlex
import subprocess
from typing import IO, TYPE_CHECKING

from cmae_scale.core.errors import ConfigError
from cmae_scale.data.locations import COMMAND, NAME_FIELD, show_location

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


PIECE_BYTES = 1 << 20  # of one read: a forged size must not fill the memory


class CommandFile(io.RawIOBase):
    """Starts the command when it is first read. Seeks forwards by reading, backwards by starting it anew.

    No shell takes part: the command is split into words first, and the file's name then replaces `{name}`
    inside of a word, so a name cannot add one. OSError when the command fails, is silent for `timeout_s` or
    writes more than `max_bytes`.
    """

    def __init__(self, location: str, *, timeout_s: float, max_bytes: int) -> None:
        self._location = location
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._position = 0  # of the reader
        self._reached = 0  # of the command's output

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Costs nothing until the next read. The end is not known."""
        if whence == io.SEEK_END:
            raise OSError(None, "the length of a command's output is not known")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Bytes read; 0 at the end of the output, once the command ended well."""
        output = self._reach(self._position)
        data = self._wait(output, len(memoryview(buffer)))
        memoryview(buffer)[: len(data)] = data
        self._position = self._reached
        return len(data)

    def close(self) -> None:
        """End the command."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._process = None
        super().close()

    def _reach(self, position: int) -> IO[bytes]:
        if self._process is None or position < self._reached:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._process = subprocess.Popen(  # noqa: S603 -- what the user allowed by name
                split_command(self._location), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
            )
            self._reached = 0
        output = self._process.stdout
        assert output is not None
        while self._reached < position and self._wait(output, position - self._reached):
            pass
        return output

    def _wait(self, output: IO[bytes], size: int) -> bytes:
        if not select.select([output], [], [], self._timeout_s)[0]:
            raise OSError(None, f"no output for {self._timeout_s:g} s")
        data = os.read(output.fileno(), min(size, PIECE_BYTES))
        self._reached += len(data)
        if self._reached > self._max_bytes:
            raise OSError(None, f"the command writes more than the {self._max_bytes} bytes that can be")
        if not data and self._process is not None and (status := self._process.wait()):
            raise OSError(None, f"the command ended with status {status}")
        return data


def split_command(location: str) -> list[str]:
    """The words of the command, with the file's name put in."""
    command, _, name = location.removeprefix(f"{COMMAND}:").partition("\0")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{show_location(location)} cannot be split into words ({error})") from None
    if not any(NAME_FIELD in word for word in words):
        raise ConfigError(
            f"{show_location(location)} does not say where the file's name belongs: write {NAME_FIELD} there"
        )
    return [word.replace(NAME_FIELD, name) for word in words]
