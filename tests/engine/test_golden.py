"""Twenty steps as they were: any change of the task's mathematics shows here.

The losses are those of a tiny run in fp32 on one CPU rank. Another CPU or another torch sums in another
order, which changes 1e-7 of a product and, after 20 steps, some 1e-6 of a loss; TOLERANCE leaves room for
that. A change that is meant is recorded with `GOLDEN=write python -m pytest tests/engine/test_golden.py`, and
the commit says why.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist

GOLDEN = Path(__file__).parent / "golden" / "twenty_steps.json"
TOLERANCE = 1e-4  # relative, of each loss of each step


@pytest.fixture
def trace(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    """[20, 3]: total, pixel and contrast loss of each step."""

    def run(cmae: dict[str, Any] | None = None) -> torch.Tensor:
        answer = on_ranks(lambda: train_tiny(tiny_run(cmae=cmae), steps=20), ranks=1)[0]
        return torch.stack([answer["losses"][step] for step in range(20)])

    return run


def read_golden() -> torch.Tensor:
    return torch.tensor(json.loads(GOLDEN.read_text())["losses"])


def test_twenty_steps_give_the_recorded_losses(trace: Callable[..., torch.Tensor]) -> None:
    losses = trace()
    if os.environ.get("GOLDEN") == "write":
        lines = [json.dumps([round(value, 7) for value in step]) for step in losses.tolist()]
        names = json.dumps(["loss", "pixel", "contrast"])
        rows = ",\n  ".join(lines)
        text = f'{{"names": {names}, "losses": [\n  {rows}\n]}}\n'
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    torch.testing.assert_close(losses, read_golden(), rtol=TOLERANCE, atol=0)


def test_so_they_do_with_redundant_operations_left_out(trace: Callable[..., torch.Tensor]) -> None:
    losses = trace({"model": {"skip_redundant": True}})
    torch.testing.assert_close(losses, read_golden(), rtol=TOLERANCE, atol=0)


@pytest.mark.slow_unless(change={"loss": {"temperature": 0.0707}})
@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"temperature": 0.0707}},
        {"loss": {"norm_pix": False}},
        {"target": {"momentum": 0.89}},
        {"target": {"final_norm": True}},
        {"mask": {"cell": 1, "ratio": 0.5}},
        {"views": {"color_ops": {"hue": 0.11}}},
        {"seed": 61},
    ],
    ids=lambda change: str(change),
)
def test_a_small_change_of_the_method_moves_them_far_more_than_the_tolerance(
    trace: Callable[..., torch.Tensor], change: dict[str, Any]
) -> None:
    golden = read_golden()
    assert float(((trace(change) - golden) / golden).abs().max()) > 10 * TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gpu_gives_the_recorded_losses(
    tiny_run: Callable[..., Any], train_tiny: Callable[..., Any], stage: int
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cmae = {"model": {"attention": "math"}}  # flash has no fp32 there
    losses = train_tiny(tiny_run(stage=stage, cmae=cmae), steps=20)["losses"]
    trace = torch.stack([losses[step] for step in range(20)]).cpu()
    torch.testing.assert_close(trace, read_golden(), rtol=TOLERANCE, atol=0)
