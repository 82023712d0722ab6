"""What ranks tell each other. Every function is the identity when there is only one process."""

import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.errors import ConfigError, DataError

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


def exchange_rows(rows: Float[Tensor, "total dim"]) -> Float[Tensor, "total dim"]:
    """What every rank has for this one, in rank order: of the rows, cut evenly, rank r is sent part r.

    Equal shapes on all ranks, without gradient. A rank sends and receives each row once, however many ranks
    there are. gloo has `all_to_all_single` for tensors on the CPU, and of NCCL it is sends and receives.
    """
    size = world_size()
    if size == 1:
        return rows.detach()
    assert len(rows) % size == 0, f"{len(rows)} rows cannot be cut evenly for {size} ranks"
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.detach().contiguous())
    return received


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


# Ranks up to which gloo's ring tells all of them as soon. On two cores, where the work of all ranks counts
# and not the way between them, it took 18 ms at 32 ranks, five rounds 45; but each hop of a ring waits for
# the one before, and there are twice as many as ranks: about 100 ms at 1,024.
RING_RANKS = 64


def highest_of_ranks(values: Tensor, *, group: Any) -> Tensor:
    """Elementwise maximum over ranks, of a few numbers on the CPU and over a gloo group of all ranks."""
    if dist.get_world_size() > RING_RANKS:
        return _highest_in_rounds(values, group=group)
    highest = values.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return highest


def _highest_in_rounds(values: Tensor, *, group: Any) -> Tensor:
    """In each round a rank tells what it knows to the one twice as far away as before.

    All know all after log2 of their number: ten messages at 1,024 ranks. Source: the dissemination barrier of
    Hensgen, Finkel and Manber (1988); a maximum may be taken twice.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    known, distance = values.clone(), 1
    while distance < size:
        heard = torch.empty_like(known)
        hearing = dist.irecv(heard, (rank - distance) % size, group=group)
        sending = dist.isend(known, (rank + distance) % size, group=group)
        for work in (hearing, sending):
            assert work is not None  # this rank is in the group
            work.wait()
        known, distance = torch.maximum(known, heard), 2 * distance
    return known


def gather_objects(value: Any) -> list[Any]:
    """A small Python value of every rank, in rank order, on all ranks."""
    size = world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def find_together(find: Callable[[], T], *, fingerprint: Callable[[T], str]) -> T:
    """What `find` gives on this rank, once every rank has found the same.

    A ConfigError or DataError of any rank is raised on all in the same words, those of the lowest rank that
    failed, with its machine before them where other machines found all. Raises DataError, on all ranks too,
    where what they found has different fingerprints. All ranks call it together.
    """
    if world_size() == 1:
        return find()
    found: T | None = None
    failure: ConfigError | DataError | None = None
    try:
        found = find()
    except (ConfigError, DataError) as error:
        failure = error
    own = "" if failure else fingerprint(cast(T, found))
    answers = gather_objects((socket.gethostname(), own, type(failure), str(failure)))
    failed = {host: kind for host, _, kind, _ in answers if kind is not type(None)}
    is_everywhere = all(host in failed for host, *_ in answers)
    error_to_raise: ConfigError | DataError | None = None
    for rank, (host, print_of_rank, kind, words) in enumerate(answers):
        place = f"rank {rank} on {host}"
        if kind is not type(None):
            error_to_raise = kind(words if is_everywhere else f"{place}: {words}")
        elif not failed and print_of_rank != answers[0][1]:
            error_to_raise = DataError(
                f"{place} finds other shards than rank 0 on {answers[0][0]}: copy them there again"
            )
        if error_to_raise is not None:
            error_to_raise.is_everywhere = True
            raise error_to_raise
    return cast(T, found)


def decide_first(decide: Callable[[], T]) -> T:
    """What `decide` gives on the first rank, on all ranks: for what is measured, and must not differ."""
    if world_size() == 1:
        return decide()
    decided = [decide() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decided, src=0)
    return cast(T, decided[0])
