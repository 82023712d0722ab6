from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.models.heads import SyncBatchNorm

DIM = 6


def run_ranks(
    body: Callable[[int], dict[str, Tensor]], *, size: int, folder: Path
) -> list[dict[str, Tensor]]:
    """What `body(rank)` returns in each of `size` gloo processes."""

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        torch.save(body(rank), folder / f"{rank}.pt")
        dist.destroy_process_group()

    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def build_pair() -> tuple[SyncBatchNorm, nn.BatchNorm1d]:
    """Ours and torch's with the same weights, away from their starting values."""
    torch_norm = nn.BatchNorm1d(DIM, eps=1e-6)
    nn.init.uniform_(torch_norm.weight, 0.5, 2.0)
    nn.init.normal_(torch_norm.bias)
    ours = SyncBatchNorm(DIM, eps=1e-6)
    ours.load_state_dict(torch_norm.state_dict())
    return ours, torch_norm


def train_step(norm: nn.Module, rows: Tensor, ahead: Tensor) -> dict[str, Tensor]:
    """Output, gradients and state after one training step whose loss is `output * ahead`, summed."""
    rows = rows.clone().requires_grad_()
    output = norm(rows)
    output.backward(ahead)
    assert rows.grad is not None
    gradients = {f"grad of {name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {"output": output.detach(), "grad of rows": rows.grad, **gradients, **norm.state_dict()}


def test_alone_it_is_batch_norm(rng: torch.Generator) -> None:
    ours, theirs = build_pair()
    for _ in range(3):
        rows, ahead = torch.randn(2, 8, DIM, generator=rng) * 3 + 1
        expected = train_step(theirs, rows, ahead)
        for name, value in train_step(ours, rows, ahead).items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
        ours.zero_grad()
        theirs.zero_grad()
    rows = torch.randn(8, DIM, generator=rng)
    torch.testing.assert_close(ours.eval()(rows), theirs.eval()(rows))


@pytest.mark.dist
def test_over_ranks_it_is_batch_norm_of_the_whole_batch(rng: torch.Generator, tmp_path: Path) -> None:
    ours, theirs = build_pair()
    rows, ahead = torch.randn(2, 8, DIM, generator=rng) * 3 + torch.arange(8.0)[:, None]
    whole = train_step(theirs, rows, ahead)
    ranks = run_ranks(
        lambda rank: train_step(ours, rows[4 * rank : 4 * rank + 4], ahead[4 * rank : 4 * rank + 4]),
        size=2,
        folder=tmp_path,
    )
    for name in ("output", "grad of rows"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), whole[name])
    for name in ("grad of weight", "grad of bias"):  # the engine adds these up
        torch.testing.assert_close(sum(rank[name] for rank in ranks), whole[name])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], whole[name])


def test_a_large_mean_does_not_cost_precision(rng: torch.Generator) -> None:
    rows = torch.randn(64, DIM, generator=rng) + 1000
    expected = nn.BatchNorm1d(DIM, eps=1e-6).double()(rows.double())
    torch.testing.assert_close(SyncBatchNorm(DIM, eps=1e-6)(rows).double(), expected, atol=2e-4, rtol=0)


def test_low_precision_rows_are_normalised_in_full_precision(rng: torch.Generator) -> None:
    rows = torch.randn(16, DIM, generator=rng).bfloat16()
    norm = SyncBatchNorm(DIM, eps=1e-6)
    expected = norm(rows.float())
    output = norm.bfloat16()(rows)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected.bfloat16())


def test_one_image_alone_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r'at least two images.*"layer"'):
        SyncBatchNorm(DIM)(torch.zeros(1, DIM))
