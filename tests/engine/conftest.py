"""A tiny run in memory: given images through the engine, or through the real loop with faults."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.cmae import CmaeConfig, MonitorConfig
from cmae_scale.config.run_file import Run, resolve_run

TINY = {
    "model": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "attention": "flash",  # named, because runs are compared to the bit
        "pixel_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 2},
        "feature_decoder": {"depth": 1, "embed_dim": 16, "num_heads": 2},
    },
    "mask": {"ratio": 0.5, "cell": 2},
    "views": {"img_px": 16, "master_px": 20, "shift_px": 5},
    "heads": {"hidden_dim": 32, "out_dim": 8},
    "target": {"momentum": 0.9},
    "data": {"shards": "none"},
}


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tree)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


@pytest.fixture
def tiny_run(tmp_path: Path) -> Callable[..., Run]:
    """`tiny_run(ranks=2, stage=3, cmae={...}, **deepspeed)`: a resolved run of 8 images per step."""

    def build(
        *,
        ranks: int = 1,
        stage: int = 0,
        accumulation: int = 1,
        cmae: dict[str, Any] | None = None,
        **more: Any,
    ) -> Run:
        ours = merge(TINY, {"out": str(tmp_path / "run"), **(cmae or {})})
        deepspeed = {
            "train_batch_size": 8,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": stage},
            "optimizer": {
                "type": "AdamW",
                # eps: some gradients are 0 but for rounding (a bias before BatchNorm); with the usual 1e-8
                # Adam would turn that noise into steps of full length, and no two runs could be compared
                "params": {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.05, "torch_adam": True},
            },
            **more,
        }
        run = Run(Path("tiny.json"), CmaeConfig.model_validate_json(json.dumps(ours)), deepspeed)
        run = resolve_run(run, batch=plan_batch(deepspeed, ranks=ranks), total_steps=10, warmup_steps=1)
        run.deepspeed["zero_optimization"] = deepspeed["zero_optimization"]  # also where one rank needs none
        return run

    return build


@pytest.fixture
def train_tiny() -> Callable[..., dict[str, Any]]:
    """`train_tiny(run, steps=3)` inside a rank: losses of each step, weights at the end, grad norm."""
    return run_steps


def run_steps(
    run: Run,
    *,
    steps: int,
    first: int | None = None,
    save_at: int | None = None,
    resave_at: int | None = None,
) -> dict[str, Any]:
    """`resave_at`: at this step, before it is taken, save what was taken up into the run folder's "again"."""
    import torch

    from cmae_scale.config.schedules import TargetMomentum
    from cmae_scale.data.stream import CropBatch
    from cmae_scale.engine.checkpoint.save_load import Keeping, begin_save
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.process.group import start_processes
    from cmae_scale.engine.setup import start_pretraining
    from cmae_scale.engine.zero.partitions import gather_weights

    context = start_processes()
    batch = plan_batch(run.deepspeed, ranks=context.world.size)
    state = start_pretraining(run, context=context, data_order="tiny")
    task = Pretraining(state, batch, TargetMomentum(run.cmae.target.momentum, total_steps=10))
    side, rank = run.cmae.views.master_px, context.world.rank
    rows = range(rank * batch.local, (rank + 1) * batch.local, batch.micro)
    losses, failed = {}, None

    def update(_: torch.Tensor) -> bool:
        state.engine.step()
        return bool(state.engine.was_step_applied())

    for step in range(state.first_step if first is None else first, steps):
        if step == resave_at:
            again = begin_save(
                state.engine,
                run.out / "again",
                step=step,
                metadata=state.metadata,
                masters=state.ema.named_masters(),
                averages={},
                extra={},
                keeping=Keeping(1),
                world=context.world,
            )
            assert not isinstance(again, str), again
            assert again.commit() is None
        pixels = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (8, 1, 3, side, side), generator=pixels, dtype=torch.uint8)
        parts = [
            CropBatch(
                images[row : row + batch.micro], torch.zeros(batch.micro, dtype=torch.int64), (), step, micro
            )
            for micro, row in enumerate(rows)
        ]
        with state.use_attention():
            losses[step] = task.take_step(parts, step=step, update=update)
        if step + 1 == save_at:
            begun = state.begin_save(step + 1)
            failed = begun if isinstance(begun, str) else begun.commit()
    norm = state.engine.get_global_grad_norm()
    return {
        "losses": losses,
        "weights": gather_weights(state.engine.module),
        "grad_norm": None if norm is None else float(norm),
        "first_step": state.first_step,
        "failed": failed,
        "notices": state.notices,
    }


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
    from cmae_scale.config.schedules import TargetMomentum, Timetable, WarmupCosine
    from cmae_scale.core.errors import UserError
    from cmae_scale.data.decoding import BadSamples
    from cmae_scale.engine.loop import open_logger, take_steps
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.process.group import start_processes
    from cmae_scale.engine.setup import start_pretraining
    from cmae_scale.engine.zero.partitions import gather_weights

    run = replace(run, settings=run.cmae.model_copy(update={"monitor": MonitorConfig(log_every=1)}))
    context = start_processes()
    batch = plan_batch(run.deepspeed, ranks=context.world.size)
    state = start_pretraining(run, context=context, data_order="tiny")
    task = Pretraining(state, batch, TargetMomentum(run.cmae.target.momentum, total_steps=10))
    times = Timetable(100, TOTAL_STEPS, 1, save_every)
    logger = open_logger(task, times=times)
    said: list[str] = []
    logger.say = said.append  # type: ignore[method-assign]
    computed: list[int] = []
    inject(state.engine.module, faults, rank=context.world.rank)

    @contextmanager
    def feed(steps: range) -> Iterator[Iterator[Any]]:
        yield images_of(run, batch, steps, rank=context.world.rank, computed=computed)

    error = None
    try:
        take_steps(
            task,
            logger,
            feed,
            steps=range(state.first_step, end),
            lr=WarmupCosine(1e-3, TOTAL_STEPS, 1),
            bad=BadSamples(1.0),
        )
    except UserError as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "weights": gather_weights(state.engine.module),
        "moments": moments(state.engine),
        "error": error,
        "said": said,
        "computed": computed,
        "lines": logger.path.read_text().splitlines() if context.world.is_first else [],
        "first_step": state.first_step,
    }


def images_of(run: Run, batch: Any, steps: range, *, rank: int, computed: list[int]) -> Iterator[Any]:
    from cmae_scale.data.stream import CropBatch

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
            yield CropBatch(images[row : row + batch.micro], labels, keys, step, micro)


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


@pytest.fixture
def run_now() -> dict[str, int]:
    """The "step" that `run_loop` is at on this rank."""
    return NOW
