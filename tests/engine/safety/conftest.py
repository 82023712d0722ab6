"""A tiny run through the real loop on images in memory, with faults put into chosen steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from cmae_scale.core.batches import plan_batch
from cmae_scale.core.config import Run
from cmae_scale.core.settings import MonitorConfig

TOTAL_STEPS = 6


class Fault(NamedTuple):
    """What befalls the forward pass of a step on one rank: kind "loss", "gradient" or "jump"."""

    step: int
    rank: int
    kind: str
    times: int = 10**6  # how often the step can go wrong


@pytest.fixture
def run_loop() -> Callable[..., dict[str, Any]]:
    """`run_loop(run, faults=[(step, rank, kind)])` inside a rank: what it did, and what must be clean."""
    return train_loop


def train_loop(
    run: Run,
    *,
    faults: Sequence[tuple[Any, ...]] = (),
    save_every: int = 100,
    end: int = TOTAL_STEPS,
) -> dict[str, Any]:
    from cmae_scale.core.durations import Timetable
    from cmae_scale.core.errors import UserError
    from cmae_scale.core.schedules import TargetMomentum, WarmupCosine
    from cmae_scale.data.bad_samples import BadSamples
    from cmae_scale.engine.loop import take_steps
    from cmae_scale.engine.pretraining import Pretraining, start_pretraining
    from cmae_scale.engine.start import start_processes
    from cmae_scale.engine.watch.journal import Journal
    from cmae_scale.engine.weights import gather_weights

    run = replace(run, settings=run.cmae.model_copy(update={"monitor": MonitorConfig(log_every=1)}))
    place = start_processes()
    batch = plan_batch(run.deepspeed, ranks=place.world.size)
    session = start_pretraining(run, place=place, data_order="tiny")
    method = Pretraining(session, batch, TargetMomentum(run.cmae.target.momentum, total_steps=10))
    times = Timetable(100, TOTAL_STEPS, 1, save_every)
    journal = Journal(session, times=times, metric_names=method.metric_names, image_flops=1)
    said: list[str] = []
    journal.say = said.append  # type: ignore[method-assign]
    computed: list[int] = []
    inject(session.engine.module, faults, rank=place.world.rank)

    @contextmanager
    def feed(steps: range) -> Iterator[Iterator[Any]]:
        yield images_of(run, batch, steps, rank=place.world.rank, computed=computed)

    error = None
    try:
        take_steps(
            method,
            journal,
            feed,
            steps=range(session.first_step, end),
            lr=WarmupCosine(1e-3, TOTAL_STEPS, 1),
            bad=BadSamples(1.0),
        )
    except UserError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "weights": gather_weights(session.engine.module),
        "moments": moments(session.engine),
        "error": error,
        "said": said,
        "computed": computed,
        "lines": journal.path.read_text().splitlines() if place.world.is_first else [],
        "first_step": session.first_step,
    }


def images_of(run: Run, batch: Any, steps: range, *, rank: int, computed: list[int]) -> Iterator[Any]:
    from cmae_scale.data.stream import MasterBatch

    side = run.cmae.views.master_px
    rows = range(rank * batch.local, (rank + 1) * batch.local, batch.micro)
    for step in steps:
        computed.append(step)
        NOW["step"] = step
        rng = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (8, 1, 3, side, side), generator=rng, dtype=torch.uint8)
        for micro, row in enumerate(rows):
            keys = tuple(f"{step}-{number}" for number in range(row, row + batch.micro))
            labels = torch.zeros(batch.micro, dtype=torch.int64)
            yield MasterBatch(images[row : row + batch.micro], labels, keys, step, micro)


NOW = {"step": -1}  # of this process


def inject(module: torch.nn.Module, faults: Sequence[tuple[Any, ...]], *, rank: int) -> None:
    left = {fault: fault.times for fault in (Fault(*values) for values in faults)}

    def after(module: Any, args: Any, output: Any) -> Any:
        if output.pixels is None:
            return output
        for fault in left:
            if (fault.step, fault.rank) == (NOW["step"], rank) and left[fault]:
                left[fault] -= 1
                match fault.kind:
                    case "loss":
                        return output._replace(pixels=output.pixels * math.nan)
                    case "jump":
                        return output._replace(pixels=output.pixels + 1000)
                    case _:
                        output.pixels.register_hook(lambda gradient: gradient * math.nan)
        return output

    module.register_forward_hook(after)


def moments(engine: Any) -> list[torch.Tensor]:
    """Adam's state on this rank in an order of its own: that of the optimizer's table may be any."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    tensors = [
        value.detach().flatten().clone()
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return sorted(tensors, key=lambda tensor: tensor.tolist())
