"""A tiny run in memory, without shards: what the engine does with given images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.core.batches import plan_batch
from cmae_scale.core.config import Run, resolve_run
from cmae_scale.core.settings import CmaeConfig

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
        return resolve_run(run, batch=plan_batch(deepspeed, ranks=ranks), total_steps=10, warmup_steps=1)

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

    from cmae_scale.core.schedules import TargetMomentum
    from cmae_scale.data.stream import MasterBatch
    from cmae_scale.engine.pretraining import Pretraining, start_pretraining
    from cmae_scale.engine.start import start_processes
    from cmae_scale.engine.states.checkpoint import Keeping, save_state
    from cmae_scale.engine.weights import gather_weights

    place = start_processes()
    batch = plan_batch(run.deepspeed, ranks=place.world.size)
    session = start_pretraining(run, place=place, data_order="tiny")
    method = Pretraining(session, batch, TargetMomentum(run.cmae.target.momentum, total_steps=10))
    side, rank = run.cmae.views.master_px, place.world.rank
    rows = range(rank * batch.local, (rank + 1) * batch.local, batch.micro)
    losses, failed = {}, None
    for step in range(session.first_step if first is None else first, steps):
        if step == resave_at:
            again = save_state(
                session.engine,
                run.out / "again",
                step=step,
                stamp=session.stamp,
                masters=session.ema.named_masters(),
                averages={},
                extra={},
                keeping=Keeping(1),
                world=place.world,
            )
            assert again is None, again
        pixels = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (8, 1, 3, side, side), generator=pixels, dtype=torch.uint8)
        parts = [
            MasterBatch(
                images[row : row + batch.micro], torch.zeros(batch.micro, dtype=torch.int64), (), step, micro
            )
            for micro, row in enumerate(rows)
        ]
        with session.use_attention():
            losses[step] = method.accumulate(parts, step=step)
        session.engine.step()
        if session.engine.was_step_applied():
            method.follow_(step=step)
        if step + 1 == save_at:
            failed = session.save(step + 1)
    norm = session.engine.get_global_grad_norm()
    return {
        "losses": losses,
        "weights": gather_weights(session.engine.module),
        "grad_norm": None if norm is None else float(norm),
        "first_step": session.first_step,
        "failed": failed,
        "notices": session.notices,
    }
