"""A time limit for calls that may never return: nothing can interrupt a read from a hung network mount.

The call is made by a thread beside the one that waits. When its time is up the waiting one goes on and
leaves it behind; it ends with the process, whatever it still waits for.
"""

import errno
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def call_within(limit_s: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError if that takes longer. Costs 20 microseconds."""
    beside: _Beside | None = getattr(_OWN, "beside", None)
    if beside is None or beside.process != os.getpid():  # threads do not live through a fork
        beside = _OWN.beside = _Beside()
    try:
        result, error = beside.call(work, limit_s)
    except Empty:
        _OWN.beside = None
        raise TimeoutError(errno.ETIMEDOUT, f"nothing came for {limit_s:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


class _Beside:
    """A thread that makes calls for another, one after another, as long as anybody holds this."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._calls: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        arguments = (self._calls, self._results)  # not self, which would never be let go
        threading.Thread(target=_answer, args=arguments, name="timed call", daemon=True).start()

    def call(self, work: Callable[[], Any], limit_s: float) -> tuple[Any, BaseException | None]:
        self._calls.put(work)
        return self._results.get(timeout=limit_s)

    def __del__(self) -> None:
        self._calls.put(None)


def _answer(
    calls: "SimpleQueue[Callable[[], Any] | None]", results: "SimpleQueue[tuple[Any, BaseException | None]]"
) -> None:
    while (work := calls.get()) is not None:
        try:
            results.put((work(), None))
        except BaseException as error:
            results.put((None, error))
        del work


_OWN = threading.local()
