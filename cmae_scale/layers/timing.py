"""Which of several ways costs less on this machine, found out in milliseconds. For the CPU only."""

import time
from collections.abc import Callable, Sequence

LEAST_ROUNDS, ROUNDS = 2, 6
HOPELESS = 3.0  # times as long as the best after the least rounds: no more of them
CLEARLY = 1.2  # times as fast as the usual way: what is less is a tie, which the moment must not decide


def time_in_turns(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The least seconds of CPU time that each of `ways` took, after a run that warms it up.

    They take turns, so that whatever else the machine does meets all of them; time in which this process was
    kept waiting does not count, as long as its threads sleep then (see world.wait_without_spinning).
    """
    for way in ways:
        way()
    least_s = [_time(way) for way in ways]
    for number in range(1, ROUNDS):
        for place, way in enumerate(ways):
            if number < LEAST_ROUNDS or least_s[place] < HOPELESS * min(least_s):
                least_s[place] = min(least_s[place], _time(way))
    return least_s


def _time(way: Callable[[], object]) -> float:
    start_s = time.process_time()
    way()
    return time.process_time() - start_s
