"""Asked to leave: what a signal to this process means, from the first line of a command to its last.

Nothing here needs torch, so that a signal counts while that is still being imported.
"""

import signal
import threading
from types import FrameType
from typing import Any

from cmae_scale.core.errors import UserError

# Slurm warns with SIGUSR1 (--signal) or SIGTERM; Ctrl-C reaches every process of a terminal
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "the file stop"  # for schedulers that cannot signal: `touch RUN/stop`
# from this process's own watch to its main thread. Its default is to be ignored, so it may come late
_WAKE = signal.SIGURG


class InterruptedRunError(UserError):
    """The run was asked to leave after `step` steps. `failed` says why its state could not be saved."""

    exit_status = 75  # sysexits' EX_TEMPFAIL: start the same command again
    is_everywhere = True

    def __init__(self, name: str, *, step: int | None, failed: str | None = None) -> None:
        self.step = step
        if name == "SIGINT":
            self.exit_status = 130  # as shells have it: a script around the run should end too
        when = "before the first step" if step is None else f"after step {step}"
        there = "there" if failed is None else f"an older checkpoint, for this one is not saved ({failed})"
        super().__init__(f"asked to leave ({name}) {when}: the same command goes on from {there}")


class DataWaitError(Exception):
    """Leave the wait for data: the run was asked to leave meanwhile."""


class StopRequest:
    """Whether this rank was asked to leave, by a signal or by word from another rank.

    Before `hold()` there is nothing to save and nobody to agree with: the process leaves at once. What asking
    again means is up to the watch, which receives signals also while the main thread cannot.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_waiting_for_data = False
        self._is_held = False
        self._told: str | None = None  # by another rank
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in (*SIGNALS, _WAKE)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on a signal is a request that all ranks agree on at their next step."""
        self._is_held = True
        if self.name is not None:  # it came before, and some import caught what it raised
            raise InterruptedRunError(self.name, step=None)

    def tell(self, name: str) -> None:
        """Word from another rank: signal `name`. Called by a thread; the main thread wakes from its wait."""
        self._told = name
        # so that it wakes from a wait: Python's handlers run there whichever thread is meant
        signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = self._told if number == _WAKE else signal.Signals(number).name
        if self.name is None and name is not None:
            self.name = name
            if not self._is_held:
                raise InterruptedRunError(name, step=None)
        if self.is_waiting_for_data:
            self.is_waiting_for_data = False
            raise DataWaitError
