"""Where a rank is in its work: told by the training loop with an assignment, read by the watch."""

import time
from typing import NamedTuple

PATIENT = 3.0  # times the usual time: the first step compiles, caches are cold, a state is large


# parts of a step that the loop enters, in the order in which ranks hold up one another
PARTS = ("starting", "reading data", "computing gradients", "updating the weights", "waiting for the others")


class Report(NamedTuple):
    """What a rank does, at which step, and for how many seconds it has been at it."""

    where: str
    step: int | None
    for_s: float

    def __str__(self) -> str:
        """For instance: reading data, step 7."""
        return self.where if self.step is None else f"{self.where}, step {self.step}"


class Heartbeat:
    """The work of this rank's main thread. Entering a part of it is progress; no part may last for ever."""

    def __init__(self) -> None:
        # one object, so that a reader sees all of it
        self._now: tuple[str, int | None, float, float] = ("starting", None, time.monotonic(), PATIENT)
        # of the part that was entered then, how long the whole process was held up; the watch's own
        self._held: tuple[float, float] = (0.0, 0.0)

    def enter(self, where: str, *, step: int | None = None, patience: float = 1.0) -> None:
        """`where` as in "rank 1 reading data, step 7". `patience` times cmae.faults.step_timeout_s is
        how long it may take. Call it again for progress within a long part.
        """
        self._now = (where, step, time.monotonic(), patience)

    def reset(self, held_s: float) -> None:
        """Do not count seconds in which the process could not run: it was stopped, or its machine asleep."""
        since_s = self._now[2]
        entered_s, before_s = self._held
        self._held = (since_s, held_s + (before_s if entered_s == since_s else 0.0))

    def read(self) -> Report:
        """Where the rank is now, and for how long."""
        where, step, since_s, _ = self._now
        entered_s, held_s = self._held
        return Report(where, step, time.monotonic() - since_s - (held_s if entered_s == since_s else 0.0))

    def is_stuck(self, timeout_s: float) -> bool:
        """Whether the present part of the work takes longer than it may."""
        return self.read().for_s > timeout_s * self._now[3]
