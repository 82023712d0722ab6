"""Ranks that are not there: collectives of several that refuse a tensor on a wrong device.

NCCL takes tensors on the rank's GPU alone, gloo takes those on the CPU; on a machine without a GPU everything
is gloo's, and a tensor in the wrong place passes. Nothing is sent: what comes back has shapes, or own values.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fakes.gpu import FakeGpu, is_on_gpu


class WrongDeviceError(AssertionError):
    """A collective got a tensor that its backend cannot send."""


class FakeRanks:
    """All collectives of a process group of NCCL's, and of groups of gloo's beside it."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.calls: list[str] = []
        self._gloo: set[str] = set()  # names of groups

    def check(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Note a collective, as torch's dispatcher sees it. Raises WrongDeviceError."""
        self.calls.append(func.name().removeprefix("c10d::").strip("_"))
        is_gloo = any(name in self._gloo for name in _list_groups(args))
        for tensor in tensors:
            if is_on_gpu(tensor) == is_gloo:
                backend, place = ("gloo", "the GPU") if is_gloo else ("NCCL", f"the {tensor.device.type}")
                raise WrongDeviceError(f"{self.calls[-1]} by {backend} got a tensor on {place}")

    def make_group(self, ranks: Any = None, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """In the place of torch.distributed.new_group."""
        group = NEW_GROUP(ranks, backend="fake")
        if backend == "gloo":
            self._gloo.add(group.group_name)
        return group

    def gather_objects(self, values: list[Any], value: Any, group: Any = None) -> None:
        """Every rank has the same. It travels through the GPU, so the host waits for it."""
        self.gpu.wait("all_gather_object")
        values[:] = [value] * len(values)

    def broadcast_objects(self, values: list[Any], src: int = 0, **kwargs: Any) -> None:
        """This is the first rank."""
        self.gpu.wait("broadcast_object_list")


NEW_GROUP = dist.new_group


def _list_groups(args: Sequence[Any]) -> list[str]:
    boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
    return [dist.ProcessGroup.unbox(one).group_name for one in boxed if "ProcessGroup" in one._type().name()]


@contextmanager
def fake_ranks(gpu: FakeGpu, *, size: int = 2) -> Iterator[FakeRanks]:
    """Inside, this process is the first of `size` ranks, each with a GPU of its own."""
    ranks = FakeRanks(gpu)
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(size)}
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, environment))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        stack.callback(dist.destroy_process_group)
        stack.enter_context(patch.object(dist, "new_group", ranks.make_group))
        stack.enter_context(patch.object(dist, "all_gather_object", ranks.gather_objects))
        stack.enter_context(patch.object(dist, "broadcast_object_list", ranks.broadcast_objects))
        stack.enter_context(patch.object(gpu, "check_collective", ranks.check))
        yield ranks
