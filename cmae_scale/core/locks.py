"""The right to be the only one at work somewhere, as a lock on a file that the kernel keeps.

The kernel lets go of it however its process ends. On NFS (Linux 2.6.12 and newer) such locks live on the
server, so that they hold between machines; a machine that vanished loses them when its lease ends (NFS 4:
90 s).
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
