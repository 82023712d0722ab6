"""All ranks go on or none: once per step they tell each other who has no data and who was asked to leave."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from cmae_scale.core.collectives import highest_of_ranks, world_size
from cmae_scale.core.errors import UserError
from cmae_scale.engine.process.group import LAST_RESORT
from cmae_scale.engine.process.signals import STOP_FILE, DataWaitError, StopRequest

T = TypeVar("T")

_REQUESTS = (
    "SIGTERM",
    "SIGUSR1",
    STOP_FILE,
    "SIGINT",
)  # by weight: what one of the ranks was asked by counts for all


class PeerFailedError(UserError):
    """Another rank could not go on. It says itself why."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """`result` of the work; `request` names the signal that some rank was asked to leave by.

    `is_busy`: some rank still had something beside the work to do.
    """

    result: T
    request: str | None
    is_busy: bool = False


class RankAgreement:
    """Work that every rank does at the same step, such as taking its batches, and that may fail on some."""

    def __init__(self, stop: StopRequest, *, step_timeout_s: float = 600.0) -> None:
        self._stop = stop
        limit = timedelta(seconds=LAST_RESORT * step_timeout_s)
        # on the CPU, so that asking costs no wait for the GPU
        self._group: Any = dist.new_group(backend="gloo", timeout=limit) if world_size() > 1 else None

    def answer(
        self,
        work: Callable[[], T],
        *,
        then: Callable[[], None] = lambda: None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> Answer[T | None]:
        """What `work` returns, and whether all should leave now. If it fails on any rank, every rank raises.

        That one raises its own error, the others PeerFailedError. A request to leave ends a wait for data, so
        `result` may be None then. `then` runs after this rank's work, before it waits for the others, and
        `is_busy` is asked there.
        """
        failure: Exception | None = None
        result: T | None = None
        try:
            result = self._work(work)
        except DataWaitError:
            pass
        except Exception as error:  # ours too: the others would wait for this rank until their timeout
            failure = error
        then()
        rank = dist.get_rank() if self._group is not None else 0
        # the highest number of a rank that failed, and of a request, both counted from 1; whether one is busy
        own = torch.tensor(
            [
                0 if failure is None else rank + 1,
                0 if self._stop.name is None else _REQUESTS.index(self._stop.name) + 1,
                int(is_busy()),
            ]
        )
        if self._group is not None:
            own = highest_of_ranks(own, group=self._group)
        failed, asked, busy = own.tolist()
        if failure is not None:
            raise failure
        if failed:
            raise PeerFailedError(f"stopped with rank {failed - 1}, which says why: it has no data to go on")
        return Answer(result, _REQUESTS[asked - 1] if asked else None, bool(busy))

    def _work(self, work: Callable[[], T]) -> T | None:
        if self._stop.name is not None:
            return None
        self._stop.is_waiting_for_data = True
        try:
            return work()
        finally:
            self._stop.is_waiting_for_data = False
