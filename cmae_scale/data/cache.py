"""Ranges of remote files kept on a local disk, up to a size. Any number of processes may share one folder."""

import fcntl
import hashlib
import logging
import os
import tempfile
import threading
from pathlib import Path

LOG = logging.getLogger(__name__)
SWEEP_SHARE = 1 / 32  # of the limit: what a process writes before it looks at the whole folder again
KEEP_SHARE = 7 / 8  # of the limit: what the oldest are removed down to, so that sweeps are seldom
PART = ".part"


class ChunkCache:
    """Each range is a file of its own, named by a hash of its file's whole address and content.

    A file appears whole or not at all (temporary file, rename). The least recently used go first. The limit
    holds but for what all processes together write between two sweeps. A full disk makes it a spectator.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._unswept = max_bytes  # so that the first one to write looks first
        self._lock = threading.Lock()
        self._has_warned = False

    def path(self, file: str, start: int) -> Path:
        """Where the range of `file` from byte `start` on is kept."""
        digest = hashlib.sha256(file.encode()).hexdigest()
        return self.folder / digest[:2] / digest / f"{start:015d}"

    def read(self, file: str, start: int, size: int) -> bytes | None:
        """The range, if it is kept in just this size."""
        path = self.path(file, start)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return data if len(data) == size else None

    def write(self, file: str, start: int, data: bytes) -> None:
        """Keep a range. Whatever goes wrong is no reason to stop: it is said once."""
        try:
            self._make_room(len(data))
            path = self.path(file, start)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=path.parent, suffix=PART)
            try:
                with os.fdopen(handle, "wb") as written:
                    written.write(data)
                Path(part).replace(path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as error:
            if not self._has_warned:
                LOG.warning(
                    "the cache in %s cannot be written (%s): read without it", self.folder, error.strerror
                )
            self._has_warned = True

    def _make_room(self, size: int) -> None:
        with self._lock:
            self._unswept += size
            if self._unswept < self.max_bytes * SWEEP_SHARE:
                return
            self._unswept = size
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # another process is at it
            self._sweep()

    def _sweep(self) -> None:
        """Remove the least recently used until the rest fits."""
        found = []
        for path in self.folder.glob("??/*/*"):
            try:
                status = path.stat()
            except OSError:
                continue  # another process was faster
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes * KEEP_SHARE:
                return
            path.unlink(missing_ok=True)
            total -= size
