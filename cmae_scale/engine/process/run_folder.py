"""The run folder before anything is computed: can every rank write there, and is this run alone in it?"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_text
from cmae_scale.core.locks import hold
from cmae_scale.core.world import World

LOCK = ".lock"
# what a run leaves in its folder, by kind: a test compares it with what a run has left
_ENCODER_FILES = ("config.json", "model.safetensors", "README.md")
PART_FOLDERS = ("checkpoints", "encoder", "pictures", "stacks", "profile", "model", "last")
PART_FILES = (
    *(LOCK, "stop", "config.json", "exit.json", "checkpoints/latest"),
    *("metrics.jsonl", "bad_samples.jsonl", "skipped_steps.jsonl"),
    *(f"{folder}/{name}" for folder in ("encoder", "model", "last") for name in _ENCODER_FILES),
    *("pictures/reconstructions.png", "pictures/curves.png", "curves.png", "confusion.png"),
    *("results.json", "predictions.csv"),
)
WAIT_FOR_LOCK_S = 10.0  # a killed run's last process may still be ending


def open_folder(folder: Path, *, world: World) -> None:
    """Make `folder` and try on every rank what a save does: write, sync, rename. All ranks call it.

    Raises ConfigError on all of them when one cannot, or does not see what the first one wrote: states are
    written by all ranks and committed by the first. Nothing that lies there is touched, and each part of the
    folder that is there already is tried too: a link to a disk that is not mounted is no empty folder.
    """
    trial, mark = folder / f".try_{world.rank}", folder / ".try_first"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(trial, "x" * 4096)  # a full disk may still take an empty file
        if world.is_first:
            write_text(mark, "x")
        failed = find_unusable(folder, rank=world.rank)
    except OSError as error:
        failed = f"rank {world.rank} on {socket.gethostname()}: {error}"
    failures = [failure for failure in gather_objects(failed) if failure]
    sees = gather_objects(bool(failures) or _sees(mark))  # the first rank has written: the line above waited
    for path in (trial, mark) if world.is_first else (trial,):
        with suppress(OSError):
            path.unlink(missing_ok=True)
    if failures:
        raise ConfigError(
            f"cannot write into the run folder {folder} ({failures[0]}): mend it, or choose another by --out"
        )
    if not all(sees):
        raise ConfigError(
            f"rank {sees.index(False)} does not see in {folder} what rank 0 writes there: --out must name a "
            "folder on a file system that all machines share"
        )


def find_unusable(folder: Path, *, rank: int) -> str | None:
    """What of the parts that lie in a run folder `rank` could not write to, or None. Leaves all as it is."""
    for name in (*PART_FOLDERS, *PART_FILES):
        path, is_folder = folder / name, name in PART_FOLDERS
        if path.is_symlink() and not path.exists():
            return f"{path} is a link to nothing: mount the disk that it leads to, or remove the link"
        if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
            return f"{path} is no {'folder' if is_folder else 'file'}: move it away"
        try:
            if path.is_dir():
                next(path.iterdir(), None)
                write_text(path / f".try_{rank}", "x" * 4096)
                (path / f".try_{rank}").unlink()
            elif path.exists():
                path.open("ab").close()
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


@contextmanager
def hold_folder(folder: Path, *, world: World) -> Iterator[None]:
    """The right to be the only run in `folder`. All ranks call it; the first one holds the lock.

    Raises ConfigError on all ranks while another run has it. Nothing stale can stand in the way: see
    core/locks.py. Where the file system has no locks nothing is checked.
    """
    path = folder / LOCK
    with _wait_for(path, is_first=world.is_first) as is_held:
        if not gather_objects(is_held)[0]:
            raise ConfigError(
                f"another run is at work in {folder} ({_holder(path)}): wait for it, stop it, or choose "
                "another folder with --out"
            )
        yield


@contextmanager
def _wait_for(path: Path, *, is_first: bool) -> Iterator[bool]:
    if not is_first:
        yield True
        return
    deadline_s = time.monotonic() + WAIT_FOR_LOCK_S
    while True:
        with hold(path, wait=False) as is_held:
            if is_held or time.monotonic() > deadline_s:
                if is_held:
                    with suppress(OSError):
                        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
                yield is_held
                return
        time.sleep(0.2)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200] or "it has not said where"
    except OSError:
        return "it has not said where"


def _sees(path: Path) -> bool:
    for _ in range(20):  # a network file system may be some seconds behind
        if path.exists():
            return True
        time.sleep(0.25)
    return False
