"""Files that appear whole, also when several processes write the same one at once."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cmae_scale.core.files import PART, sync


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at `path` when the block ends well, complete and on disk, and not otherwise.

    Its part has a name of its own: one that outlives its killed parent for a moment, or is written on another
    machine, meets no other.
    """
    part = path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}{PART}")
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
    part = path.with_name(f".{path.name.removeprefix('.')}.{secrets.token_hex(4)}{PART}")
    try:
        part.write_bytes(content)
        os.link(part, path)  # unlike a rename, it refuses to replace, over NFS too
    except FileExistsError:
        return False
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)
    return True
