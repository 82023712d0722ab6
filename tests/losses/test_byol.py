import pytest
import torch

from cmae_scale.losses import byol


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


def test_gradient_reaches_the_queries_alone(rng: torch.Generator) -> None:
    query, key = (torch.randn(5, 8, generator=rng, requires_grad=True) for _ in range(2))
    byol(query, key).backward()
    assert query.grad is not None
    assert query.grad.any()
    assert key.grad is None


def test_low_precision_input_is_compared_in_full_precision(rng: torch.Generator) -> None:
    query, key = torch.randn(2, 8, 256, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = byol(query, key)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, byol(query.float(), key.float()))
