"""Files that appear whole or not at all, also through a crash of the machine."""

import os
from pathlib import Path

PART = ".part"  # ending of what is still being written


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: a reader sees the old content or the new, never a part."""
    part = path.with_name(path.name + PART)
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sync_tree(folder: Path) -> None:
    """Force every file below `folder` and the folder itself to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Force one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
