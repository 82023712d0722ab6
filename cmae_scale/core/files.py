"""Files that appear whole or not at all, through crashes and with several writers, and locks on files."""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # ending of what is still being written


def write_text(path: Path, text: str, *, is_private: bool = False) -> None:
    """Replace `path` by `text` at once: a reader sees the old content or the new, never a part.

    `is_private`: nobody but its owner may read it.
    """
    with write_whole(path) as file:
        if is_private:
            os.fchmod(file.fileno(), 0o600)
        file.write(text.encode())


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends well, complete and on disk, and not otherwise.

    Its part has a name of its own: one that outlives its killed parent for a moment, or is written on another
    machine, meets no other.
    """
    part = _name_part(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_first(path: Path, content: bytes) -> bool:
    """Write `path` if nobody has; False if it is there already. Of several at once, one succeeds."""
    part = _name_part(path)
    try:
        part.write_bytes(content)
        os.link(part, path)  # unlike a rename, it refuses to replace, over NFS too
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)
    return True


class LineFile:
    """A text file that lines are added to. What a full or lost disk does not take waits for the next time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def add(self, lines: str) -> str | None:
        """Add whole lines, and those that wait from before. None, or why they wait now too."""
        self._waiting += lines
        size = None
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting if _ends_whole(self.path) else "\n" + self._waiting)
        except OSError as error:
            if size is not None:
                with suppress(OSError):  # a part of them may have been written: they come again as a whole
                    os.truncate(self.path, size)
            return str(error)
        self._waiting = ""
        return None


def _ends_whole(path: Path) -> bool:
    """Whether the last line has its end: that of a killed process may be torn."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size == 0 or file.read(1) == b"\n"


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; none there is as good."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _name_part(path: Path) -> Path:
    return path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}{PART}")


WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # some cluster file systems have none


@contextmanager
def hold(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether the lock was free (with `wait` it is, in the end). Its file goes when the block ends."""
    flags = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, flags)
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                os.close(handle)
                raise
        if _is_still(handle, path):
            break
        os.close(handle)  # its last holder has just removed it
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
