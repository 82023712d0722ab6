import math

import pytest
import torch
from torch import Tensor

from cmae_scale.losses import byol, infonce


def cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(sum(a * a for a in first) * sum(b * b for b in second))


def plain_infonce(query: Tensor, keys: Tensor, *, first_row: int, temperature: float) -> float:
    """Paper equation 7, one query and one key at a time."""
    total = 0.0
    for row, own in enumerate(query.tolist()):
        similarities = [math.exp(cosine(own, key) / temperature) for key in keys.tolist()]
        total -= math.log(similarities[first_row + row] / sum(similarities))
    return total / len(query)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
@pytest.mark.parametrize("first_row", [0, 3, 8])
def test_equals_the_double_loop(rng: torch.Generator, temperature: float, first_row: int) -> None:
    query, keys = torch.randn(4, 16, generator=rng), torch.randn(12, 16, generator=rng)
    loss = infonce(query, keys, first_row=first_row, temperature=temperature)
    expected = plain_infonce(query.double(), keys.double(), first_row=first_row, temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_splitting_the_batch_over_ranks_changes_nothing(rng: torch.Generator, ranks: int) -> None:
    query, keys = torch.randn(2, 12, 16, generator=rng)
    whole = infonce(query, keys, first_row=0, temperature=0.07)
    rows = len(query) // ranks
    parts = [
        infonce(part, keys, first_row=rank * rows, temperature=0.07)
        for rank, part in enumerate(query.split(rows))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_queries_that_fit_no_key_better_cost_the_logarithm_of_their_number() -> None:
    loss = infonce(torch.ones(4, 8), torch.ones(4096, 8), first_row=0, temperature=0.07)
    assert loss.item() == pytest.approx(math.log(4096), abs=1e-4)


def test_queries_that_equal_their_key_alone_cost_almost_nothing() -> None:
    keys = torch.eye(16)
    assert infonce(keys, keys, first_row=0, temperature=0.07).item() < 1e-4


def test_lengths_of_vectors_do_not_matter(rng: torch.Generator) -> None:
    query, keys = torch.randn(2, 6, 16, generator=rng)
    scaled = infonce(query * 50, keys * 0.01, first_row=0, temperature=0.07)
    torch.testing.assert_close(scaled, infonce(query, keys, first_row=0, temperature=0.07))


def test_gradient_reaches_the_queries_alone(rng: torch.Generator) -> None:
    query, keys = (torch.randn(5, 8, generator=rng, requires_grad=True) for _ in range(2))
    infonce(query, keys, first_row=0, temperature=0.07).backward()
    assert query.grad is not None
    assert query.grad.any()
    assert keys.grad is None


def test_gradient_is_that_of_the_definition(rng: torch.Generator) -> None:
    query, keys = torch.randn(2, 3, 4, generator=rng)
    query.requires_grad_()
    infonce(query, keys, first_row=0, temperature=0.5).backward()
    step = 1e-5
    for row in range(3):
        for column in range(4):
            either = []
            for sign in (1, -1):
                moved = query.detach().double().clone()
                moved[row, column] += sign * step
                either.append(plain_infonce(moved, keys.double(), first_row=0, temperature=0.5))
            assert query.grad is not None
            assert query.grad[row, column].item() == pytest.approx(
                (either[0] - either[1]) / (2 * step), abs=1e-5
            )


def test_low_precision_input_is_compared_in_full_precision(rng: torch.Generator) -> None:
    query, keys = torch.randn(2, 64, 256, generator=rng).bfloat16()
    expected = infonce(query.float(), keys.float(), first_row=0, temperature=0.07)
    with torch.autocast("cpu", torch.bfloat16):
        loss = infonce(query, keys, first_row=0, temperature=0.07)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_equals_the_squared_distance_of_unit_vectors(rng: torch.Generator) -> None:
    query, key = torch.randn(2, 7, 16, generator=rng)
    total = 0.0
    for own, other in zip(query.double(), key.double(), strict=True):
        total += (own / own.norm() - other / other.norm()).square().sum().item()
    assert byol(query, key).item() == pytest.approx(total / 7, rel=1e-5)


@pytest.mark.parametrize(("sign", "expected"), [(1, 0.0), (-1, 4.0)])
def test_runs_from_zero_to_four(rng: torch.Generator, sign: int, expected: float) -> None:
    query = torch.randn(5, 16, generator=rng)
    assert byol(query, sign * 3 * query).item() == pytest.approx(expected, abs=1e-6)


def test_byols_gradient_reaches_the_queries_alone(rng: torch.Generator) -> None:
    query, key = (torch.randn(5, 8, generator=rng, requires_grad=True) for _ in range(2))
    byol(query, key).backward()
    assert query.grad is not None
    assert query.grad.any()
    assert key.grad is None


def test_byol_compares_low_precision_input_in_full_precision(rng: torch.Generator) -> None:
    query, key = torch.randn(2, 8, 256, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = byol(query, key)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, byol(query.float(), key.float()))
