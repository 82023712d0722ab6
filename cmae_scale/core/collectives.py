"""What ranks tell each other. Every function is the identity when there is only one process."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that take part (1 before the process group starts)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Float[Tensor, "local dim"]) -> Float[Tensor, "total dim"]:
    """The rows of all ranks in rank order, without gradient. Every rank must bring equally many."""
    size = world_size()
    if size == 1:
        return rows.detach()
    total = rows.new_empty(size * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(total, rows.detach().contiguous())
    return total


class _GatherWithGrad(torch.autograd.Function):
    """Stack one tensor per rank; the gradient of a rank's part is the sum over ranks of what reached it."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        size = dist.get_world_size()
        parts = part.new_empty(size, *part.shape)
        dist.all_gather_into_tensor(parts.view(-1), part.contiguous().view(-1))
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        if dist.get_backend() == dist.Backend.NCCL:
            own = torch.empty_like(grad[0])
            dist.reduce_scatter_tensor(own.view(-1), grad.view(-1))
            return own
        total = grad.clone()  # gloo has no such collective everywhere
        dist.all_reduce(total)
        return total[dist.get_rank()]


def stack_ranks(part: Tensor) -> Tensor:
    """[size, *part.shape]: `part` of every rank, with gradient. Equal shapes on all ranks."""
    if world_size() == 1:
        return part[None]
    stacked: Tensor = _GatherWithGrad.apply(part)
    return stacked


def mean_of_ranks(values: Tensor) -> Tensor:
    """Elementwise mean over ranks, without gradient."""
    size = world_size()
    if size == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / size


def sum_of_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over ranks, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """A small Python value of every rank, in rank order, on all ranks."""
    size = world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def decide_first(decide: Callable[[], T]) -> T:
    """What `decide` gives on the first rank, on all ranks: for what is measured, and must not differ."""
    if world_size() == 1:
        return decide()
    decided = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return cast(T, decided[0])
