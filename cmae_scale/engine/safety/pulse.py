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


class Pulse:
    """The work of this rank's main thread. Entering a part of it is progress; no part may last for ever."""

    def __init__(self) -> None:
        # one object, so that a reader sees all of it
        self._now: tuple[str, int | None, float, float] = ("starting", None, time.monotonic(), PATIENT)

    def enter(self, where: str, *, step: int | None = None, patience: float = 1.0) -> None:
        """`where` as in "rank 1 reading data, step 7". `patience` times cmae.faults.step_timeout_s is
        how long it may take. Call it again for progress within a long part.
        """
        self._now = (where, step, time.monotonic(), patience)

    def read(self) -> Report:
        """Where the rank is now."""
        where, step, since_s, _ = self._now
        return Report(where, step, time.monotonic() - since_s)

    def is_stuck(self, timeout_s: float) -> bool:
        """Whether the present part of the work takes longer than it may."""
        _, _, since_s, patience = self._now
        return time.monotonic() - since_s > timeout_s * patience
