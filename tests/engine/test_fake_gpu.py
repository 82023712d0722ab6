"""The training loop on a GPU that is not there: where tensors lie, and what the host waits for."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes.engine import fake_training


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_steady_step(on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], stage: int) -> None:
    run = tiny_run(ranks=2, stage=stage, accumulation=2, cmae={"model": {"attention": "math"}})

    def train() -> Any:
        with fake_training(run) as training:
            waits = []
            for _ in range(4):
                training.gpu.waits.clear()
                training.take()
                waits.append(Counter(training.gpu.waits))
            return waits, Counter(training.ranks.calls)

    [(waits, calls)] = on_ranks(train, ranks=1)
    for one in waits:
        print(one)
    print(calls)
