"""A run that is held to algorithms which repeat their bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist

STAGES = [(0, 1), (1, 2), (3, 1)]


@pytest.mark.parametrize(("stage", "accumulation"), STAGES)
def test_every_operation_of_a_step_has_a_deterministic_way(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    accumulation: int,
) -> None:
    def train(*, deterministic: bool) -> Any:
        run = tiny_run(stage=stage, accumulation=accumulation, cmae={"deterministic": deterministic})
        return train_tiny(run, steps=2), torch.are_deterministic_algorithms_enabled()

    (free, was_held), (held, is_held) = (
        on_ranks(lambda setting=setting: train(deterministic=setting), ranks=1)[0]
        for setting in (False, True)
    )
    assert (was_held, is_held) == (False, True)
    for step, losses in free["losses"].items():
        torch.testing.assert_close(held["losses"][step], losses, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_gpu_repeats_its_bits(
    tiny_run: Callable[..., Any], train_tiny: Callable[..., Any], graphs: str
) -> None:
    settings = {
        "deterministic": True,
        "cuda_graphs": graphs,
        "model": {"attention": "auto"},
        "checkpoint": {"resume": "never"},
    }
    autocast = {"enabled": True, "dtype": "bfloat16"}
    try:
        runs = [train_tiny(tiny_run(cmae=settings, torch_autocast=autocast), steps=6) for _ in "ab"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[0]["losses"][step], runs[1]["losses"][step]) for step in range(6))
    assert all(torch.equal(value, runs[1]["weights"][name]) for name, value in runs[0]["weights"].items())
