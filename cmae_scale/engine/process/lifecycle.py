"""The frame around a run of many processes: its folder, held by one run, its group and its exit status."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from cmae_scale.config.run_file import Run, name_settings
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.credentials import mask
from cmae_scale.core.errors import ConfigError, UserError
from cmae_scale.core.files import hold, write_text
from cmae_scale.core.world import World
from cmae_scale.engine.process.group import RankContext, start_processes, stop_processes
from cmae_scale.engine.process.signals import InterruptedRunError, StopRequest
from cmae_scale.engine.process.watchdog import FAILED, Watchdog


@contextmanager
def run_context(run: Run, stop: StopRequest) -> Iterator[RankContext]:
    """This process's place among the ranks of `run`, watched. `stop` has been listening for signals already.

    Inside, a signal is a request that `take_steps` answers at its next step, a rank that dies or freezes ends
    the others with its name, and so does a step that never ends. RUN/exit.json says how it all ended, for
    launchers pass on some rank's status or none. Raises ConfigError when the run folder cannot be used.
    """
    context = start_processes(step_timeout_s=run.settings.faults.step_timeout_s, stop=stop)
    stop.hold()
    note = ExitNote(run.out, context)
    with Watchdog(
        world=context.world,
        heartbeat=context.heartbeat,
        stop=stop,
        faults=run.settings.faults,
        kind=run.kind,
        out=run.out,
        on_end=lambda cause: note.write(FAILED, cause),
    ) as watch:
        try:
            open_folder(run.out, world=context.world)
            with hold_folder(run.out, world=context.world):
                note.begin()
                yield context
                note.write_first(0, "done")
        except UserError as error:
            error.args = (name_settings(str(error), run.kind),)
            watch.report(str(error), is_shared=True)
            note.write_first(error.exit_status, str(error), done=getattr(error, "step", None))
            raise
        except Exception as error:
            if is_about_peers(error):
                watch.await_verdict()
            text = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            watch.report(text, is_shared=False)
            note.write_first(FAILED, text)
            raise
    stop_processes()


def is_about_peers(error: Exception) -> bool:
    """Whether an error says no more than that another rank could not be reached."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "nccl", "connection"))


class ExitNote:
    """RUN/exit.json: status, cause, the last step and state, and what to do next."""

    def __init__(self, out: Path, context: RankContext) -> None:
        self._out = out
        self._context = context
        self._is_ours = False  # the folder; another run's note stays

    def begin(self) -> None:
        """A run that is at work, or was killed, has none."""
        self._is_ours = True
        if self._context.world.is_first:
            with suppress(OSError):
                (self._out / "exit.json").unlink(missing_ok=True)

    def write_first(self, status: int, cause: str, *, done: int | None = None) -> None:
        """Write it on the first rank. `done` is the number of steps done, where it is known."""
        if self._context.world.is_first:
            self.write(status, cause, done=done)

    def write(self, status: int, cause: str, *, done: int | None = None) -> None:
        """Write it on this rank. A disk that does not take it is no error on top of the other."""
        if not self._is_ours:
            return
        states = sorted(path.name for path in (self._out / "checkpoints").glob("step_*") if not path.suffix)
        note = {
            "status": status,
            "cause": mask(cause),
            "step": self._context.heartbeat.read().step if done is None else done,
            "state": states[-1] if states else None,
            "next": _advise(status),
        }
        with suppress(OSError):
            write_text(self._out / "exit.json", json.dumps(note, indent=2) + "\n")


def _advise(status: int) -> str:
    if status == 0:
        return "nothing is left to do, or go on with the same command"
    if status in (InterruptedRunError.exit_status, 130):
        return "start the same command again: it goes on from the state"
    return "mend the cause, then start the same command again: it goes on from the state"


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
