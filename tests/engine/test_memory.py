"""Memory of real steps on real ranks beside the prediction: the tensors that are alive, not what the
allocator makes of them (that is `python -m cmae_scale.bench memory`)."""

from collections.abc import Callable
from typing import Any

import pytest

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.cmae import Attention
from cmae_scale.config.precision import read_formats
from cmae_scale.config.run_file import Run
from cmae_scale.sizing.activations import Kernel
from cmae_scale.sizing.memory import plan_moments, predict_peak
from cmae_scale.sizing.zero import Job, is_optimizer_fused, read_zero

# small, because bf16 is slow on many CPUs; so small that stage 3 would keep matrices whole, were it not told
SPLIT = {"stage3_param_persistence_threshold": 1000}
MODEL = {
    "model": {
        "embed_dim": 192,
        "depth": 3,
        "num_heads": 3,
        "patch_size": 4,
        "pixel_decoder": {"depth": 2, "embed_dim": 192, "num_heads": 3},
        "feature_decoder": {"depth": 1, "embed_dim": 192, "num_heads": 3},
    },
    "views": {"img_px": 24, "master_px": 24, "shift_px": 1},
    "heads": {"hidden_dim": 192, "out_dim": 64},
}
PLAIN: dict[str, Any] = {}
HYBRID = {"conv": {"dims": (64, 96), "depths": (2, 1)}}
FP32: dict[str, Any] = {}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
BF16 = {"bf16": {"enabled": True}}
KERNELS: dict[Kernel, Attention] = {"fused": "flash", "explicit": "explicit"}


def measure(run: Run, live: Any, *, steps: int = 2) -> dict[str, int]:
    """Peak of the tensors alive over all steps and what stays between two, on this rank."""
    from cmae_scale.benchmarks.peak_memory import train_on_noise
    from cmae_scale.engine.process.group import start_processes

    context = start_processes()
    with live:
        batch = plan_batch(run.deepspeed, ranks=context.world.size)
        state = train_on_noise(run, context=context, batch=batch, steps=steps)
        found = {"peak": live.peak, "idle": live.now}
        del state  # until here
    return found


@pytest.mark.slow_unless(encoder=PLAIN, stage=2, precision=FP32)
@pytest.mark.dist
@pytest.mark.parametrize(
    ("encoder", "stage", "ranks", "accumulation", "precision", "remat"),
    [
        (PLAIN, 0, 1, 1, FP32, "none"),
        (PLAIN, 0, 2, 1, BF16, "none"),
        (PLAIN, 1, 2, 1, AUTOCAST, "none"),
        (PLAIN, 1, 2, 2, AUTOCAST, "selective"),
        (PLAIN, 2, 2, 2, FP32, "none"),
        (PLAIN, 2, 1, 1, AUTOCAST, "full"),
        (PLAIN, 3, 2, 1, AUTOCAST, "none"),
        (PLAIN, 3, 2, 1, BF16, "full"),
        (HYBRID, 2, 2, 1, AUTOCAST, "none"),
    ],
)
def test_the_predicted_peak_is_that_of_a_real_step(
    tiny_run: Callable[..., Run],
    on_ranks: Callable[..., list[Any]],
    live_bytes: Any,
    encoder: dict[str, Any],
    stage: int,
    ranks: int,
    accumulation: int,
    precision: dict[str, Any],
    remat: str,
) -> None:
    kernel: Kernel = "explicit" if precision else "fused"
    run = tiny_run(
        ranks=ranks,
        stage=stage,
        accumulation=accumulation,
        cmae={**MODEL, "model": {**MODEL["model"], **encoder, "remat": remat, "attention": KERNELS[kernel]}},
        train_batch_size=32,
        zero_optimization={
            "stage": stage,
            "reduce_bucket_size": 250_000,
            "overlap_comm": stage in (1, 3),
            **SPLIT,
        },
        **precision,
    )
    job = Job(
        cfg=run.cmae,
        formats=read_formats(run.deepspeed),
        zero=read_zero(run.deepspeed, ranks=ranks),
        batch=plan_batch(run.deepspeed, ranks=ranks),
        kernel=kernel,
        # storages count whole, as on a GPU; but stage 0 updates one tensor after the other here
        device="cpu" if stage == 0 else "cuda",
        is_fused=is_optimizer_fused(run.deepspeed),
    )
    measured = on_ranks(lambda: measure(run, live_bytes), ranks=ranks)[0]
    idle = next(moment for moment in plan_moments(job) if moment.name == "average")
    assert predict_peak(job).total_bytes == pytest.approx(measured["peak"], rel=0.07)
    assert idle._replace(views=0, working=0).total_bytes == pytest.approx(measured["idle"], rel=0.03)


@pytest.mark.dist
@pytest.mark.parametrize("cmae", [{}, {"loss": {"weight": 0.0}}], ids=["cmae", "mae"])
def test_views_are_those_of_one_micro_batch_however_many_a_step_has(
    tiny_run: Callable[..., Run], on_ranks: Callable[..., list[Any]], live_bytes: Any, cmae: dict[str, Any]
) -> None:
    side, micro = 128, 2

    def peak(accumulation: int) -> int:
        large = {"views": {"img_px": side, "master_px": side, "shift_px": 1}, "model": {"patch_size": 32}}
        size = {"accumulation": accumulation, "train_batch_size": micro * accumulation}
        run = tiny_run(**size, cmae={**cmae, **large})
        found = on_ranks(lambda: measure(run, live_bytes), ranks=1)[0]["peak"]
        return int(found) - 3 * side**2 * micro * accumulation  # the images themselves, in main memory

    view = 3 * side**2 * micro * 4
    assert peak(8) - peak(2) < view
