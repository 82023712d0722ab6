"""All ranks go on or none: a rank that cannot is told to the others before they would wait for it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmae_scale.core.collectives import world_size
from cmae_scale.core.errors import UserError

T = TypeVar("T")


class PeerFailedError(UserError):
    """Another rank could not go on. It says itself why."""


class Agreement:
    """Work that every rank does at the same step, such as taking its batches, and that may fail on some."""

    def __init__(self) -> None:
        # on the CPU, so that asking costs no wait for the GPU
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None

    def do(self, work: Callable[[], T]) -> T:
        """What `work` returns. If it fails on any rank, every rank raises: that one its own error."""
        if self._group is None:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # ours too: the others would wait for this rank until their timeout
            failure = error
        # the highest number of a rank that failed, counted from 1
        flag = torch.tensor([0 if failure is None else dist.get_rank() + 1])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        if failure is not None:
            raise failure
        if flag.item():
            raise PeerFailedError(
                f"stopped with rank {int(flag) - 1}, which says why: it has no data to go on"
            )
        return result
