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
WAIT_FOR_LOCK_S = 10.0  # a killed run's last process may still be ending


def open_folder(folder: Path, *, world: World) -> None:
    """Make `folder` and try on every rank what a save does: write, sync, rename. All ranks call it.

    Raises ConfigError on all of them when one cannot, or does not see what the first one wrote: states are
    written by all ranks and committed by the first.
    """
    trial, mark = folder / f".try_{world.rank}", folder / ".try_first"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(trial, "x" * 4096)  # a full disk may still take an empty file
        if world.is_first:
            write_text(mark, "x")
        failed = None
    except OSError as error:
        failed = f"rank {world.rank} on {socket.gethostname()}: {error}"
    failures = [failure for failure in gather_objects(failed) if failure]
    sees = gather_objects(bool(failures) or _sees(mark))  # the first rank has written: the line above waited
    for path in (trial, mark) if world.is_first else (trial,):
        with suppress(OSError):
            path.unlink(missing_ok=True)
    if failures:
        raise ConfigError(
            f"cannot write into the run folder {folder} ({failures[0]}): choose another with --out"
        )
    if not all(sees):
        raise ConfigError(
            f"rank {sees.index(False)} does not see in {folder} what rank 0 writes there: --out must name a "
            "folder on a file system that all machines share"
        )


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
