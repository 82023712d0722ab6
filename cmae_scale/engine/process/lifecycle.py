"""The frame around a run of many processes, from the process group to the exit status."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from cmae_scale.config.run_file import Run, name_settings
from cmae_scale.core.credentials import mask
from cmae_scale.core.errors import UserError
from cmae_scale.core.files import write_text
from cmae_scale.engine.process.group import RankContext, start_processes, stop_processes
from cmae_scale.engine.process.run_folder import hold_folder, open_folder
from cmae_scale.engine.process.signals import InterruptedRunError, StopRequest
from cmae_scale.engine.process.watchdog import FAILED, Watchdog


@contextmanager
def run_context(run: Run, stop: StopRequest) -> Iterator[RankContext]:
    """This process's place among the ranks of `run`, watched. `stop` has been listening for signals already.

    Inside, a signal is a request that `take_steps` answers at its next step, a rank that dies or freezes ends
    the others with its name, and so does a step that never ends. RUN/exit.json says how it all ended, for
    launchers pass on some rank's status or none. Raises ConfigError when the run folder cannot be used.
    """
    context = start_processes(stop=stop)
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
