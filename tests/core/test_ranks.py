from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmae_scale.augment.draws import step_generator
from cmae_scale.core import collectives
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.world import World, read_world


def test_the_world_is_what_the_launcher_says() -> None:
    assert read_world({}) == World(rank=0, size=1, local_rank=0)
    assert read_world({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == World(5, 8, 1)


@pytest.mark.parametrize("environ", [{"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_an_impossible_world_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        read_world(environ)


def test_one_process_talks_to_itself() -> None:
    rows = torch.arange(6.0).view(2, 3).requires_grad_()
    assert collectives.world_size() == 1
    assert not collectives.gather_rows(rows).requires_grad
    assert torch.equal(collectives.stack_ranks(rows), rows[None])
    assert collectives.gather_objects("a") == ["a"]
    assert torch.equal(collectives.sum_of_ranks(rows), rows)
    assert torch.equal(collectives.exchange_rows(rows), rows)


@pytest.mark.dist
def test_collectives_put_ranks_in_order_and_sum_gradients(on_ranks: Callable[..., list[Any]]) -> None:
    def ask() -> Any:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        part = torch.full((2, 3), float(rank + 1), requires_grad=True)
        stacked = collectives.stack_ranks(part)
        (stacked * torch.tensor([1.0, 10.0, 100.0])[:, None, None]).sum().backward()
        return (
            collectives.gather_rows(part)[:, 0].tolist(),
            stacked[:, 0, 0].tolist(),
            part.grad,
            collectives.mean_of_ranks(part)[0, 0].item(),
            collectives.gather_objects(rank),
            collectives.exchange_rows(torch.arange(6).view(6, 1) + 10 * rank)[:, 0].tolist(),
        )

    for rank, (rows, stacked, grad, mean, objects, sent) in enumerate(on_ranks(ask, ranks=3)):
        assert rows == [1, 1, 2, 2, 3, 3]
        assert stacked == [1, 2, 3]
        assert torch.equal(grad, torch.full((2, 3), 3 * 10.0**rank))  # every rank's loss reached this part
        assert mean == 2
        assert objects == [0, 1, 2]
        assert sent == [10 * source + 2 * rank + row for source in range(3) for row in range(2)]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3, 5, 6])
def test_rounds_and_ring_find_the_same_maximum(on_ranks: Callable[..., list[Any]], ranks: int) -> None:
    def ask() -> list[list[int]]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        group, rank = dist.new_group(backend="gloo"), dist.get_rank()
        told = []
        for holder in range(ranks):  # each of them knows something that the others do not
            own = torch.tensor([rank, 7 if rank == holder else 0])
            for collectives.RING_RANKS in (64, 1):
                told.append(collectives.highest_of_ranks(own, group=group).tolist())
            assert own.tolist() == [rank, 7 if rank == holder else 0]
        return told

    for told in on_ranks(ask, ranks=ranks):
        assert told == [[ranks - 1, 7]] * (2 * ranks)


@pytest.mark.dist
def test_on_gpus_each_rank_gets_its_part_of_the_gradient_alone(
    on_ranks: Callable[..., list[Any]],
) -> None:
    """NCCL is played by gloo: what it is asked for, and that the sums are the same."""

    def ask() -> Any:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        asked: list[int] = []

        def scatter(own: torch.Tensor, parts: torch.Tensor) -> None:
            asked.append(parts.numel())
            total = parts.clone()
            dist.all_reduce(total)
            own.copy_(total.chunk(2)[dist.get_rank()])

        gradients = []
        for backend in ("gloo", "nccl"):
            if backend == "nccl":
                dist.get_backend = lambda: "nccl"
                dist.reduce_scatter_tensor = scatter
            part = torch.full((2, 3), float(dist.get_rank() + 1), requires_grad=True)
            (collectives.stack_ranks(part) * torch.tensor([1.0, 10.0])[:, None, None]).sum().backward()
            gradients.append(part.grad)
        return gradients, asked

    for (plain, scattered), asked in on_ranks(ask, ranks=2):
        assert torch.equal(plain, scattered)
        assert asked == [12]


def test_a_step_draws_the_same_numbers_whenever_it_runs() -> None:
    first = torch.rand(4, generator=step_generator(1, step=7, purpose="mask"))
    assert torch.equal(first, torch.rand(4, generator=step_generator(1, step=7, purpose="mask")))
    for other in (
        step_generator(2, step=7, purpose="mask"),
        step_generator(1, step=8, purpose="mask"),
        step_generator(1, step=7, purpose="views"),
    ):
        assert not torch.equal(first, torch.rand(4, generator=other))
