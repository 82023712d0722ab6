"""How fast whole optimizer steps are on a GPU and what they hold, with random images and with a loader."""

import gc
import time
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch

from cmae_scale.benchmarks.noise import NoiseTraining, Size, Stage, make_noise, read_noise_run
from cmae_scale.config.batches import plan_batch
from cmae_scale.config.cmae import DataConfig
from cmae_scale.config.run_file import Run
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.stream import BatchStream, CropBatch, open_batches
from cmae_scale.engine.process.devices import read_peak_flops
from cmae_scale.engine.process.group import RankContext, start_processes, stop_processes
from cmae_scale.layers.attention import describe_attention
from cmae_scale.planning.forecast import describe_job
from cmae_scale.sizing.memory import predict_peak
from cmae_scale.sizing.zero import Device

Figures = dict[str, Any]
UNCOMPILED = ("cmae.compile=none",)
# kernel by kernel, as the host comes to it
LAUNCHED = ("cmae.compile=none", "cmae.cuda_graphs=off", "cmae.fused_views=off")

# from the most to the least wanted
SIZES = (
    Size("vitl", 64, LAUNCHED),
    Size("vitl", 64, UNCOMPILED),
    Size("vitl", 64),
    Size("vits", 128, LAUNCHED),
    Size("vits", 128, UNCOMPILED),
    Size("vits", 128),
    Size("vitb", 128),
    Size("vitl", 128),
    Size("vits", 512),
    Size("vits", 128, ("cmae.model.skip_redundant=true",)),
    Size("vitl", 256),
    Size("vitb", 256),
    Size("vitl", 64, UNCOMPILED, accumulation=4),
    Size("convvitb", 64, UNCOMPILED),
    Size("vitl_zero3", 64),
    Size("vitl", 128, (*UNCOMPILED, "cmae.model.remat=full")),
    Size("vitl", 128, ("cmae.model.remat=selective",)),
    Size("vits", 128, (*UNCOMPILED, "cmae.model.attention=flash")),
    Size("vitl", 64, ("cmae.deterministic=true",)),
)
QUICK = 8  # of them with --quick


def benchmark_steps(stage: Stage) -> Iterator[tuple[str, Figures]]:
    """Images per second, share of the peak, memory beside its prediction, and where the time goes."""
    context = start_processes()
    for size in SIZES[:QUICK] if stage.is_quick else SIZES:
        if name_size(size) not in stage.known:
            yield name_size(size), measure_steps(size, stage, context)
    stop_processes()


def name_size(size: Size) -> str:
    """For instance "vitl, 64 x 4, remat=full"."""
    changes = [change.rpartition(".")[2] for change in size.changes]
    return ", ".join([size.run_file, f"{size.micro} x {size.accumulation}", *changes])


def measure_steps(size: Size, stage: Stage, context: RankContext) -> Figures:
    """The figures of one size; what fails is told in them."""
    run = read_noise_run(size, stage)
    torch.compiler.reset()
    gc.collect()
    is_cuda, before = not stage.is_rehearsal, 0
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    training = None
    try:
        training = NoiseTraining(run, context=context)
        noise = cycle(make_noise(run, training.batch, step=0, pin=is_cuda))
        time_steps(training, noise, steps=4)
        training.state.timer.read(4)
        steps = 2 if stage.is_rehearsal else 10
        step_s = time_steps(training, noise, steps=steps)
        timer = training.state.timer.read(steps)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    finally:
        if training is not None:
            training.close()
    device: Device = "cuda" if is_cuda else "cpu"
    predicted = predict_peak(describe_job(training.state.run, batch=training.batch, ranks=1, device=device))
    peak = torch.cuda.max_memory_allocated() - before if is_cuda else 0
    return {
        **_rate(training, step_s, context),
        "peak_gib": peak / 2**30,
        "predicted_gib": predicted.total_bytes / 2**30,
        "spans": {name: value for name, value in timer.items() if value},
    }


def time_steps(training: NoiseTraining, batches: Iterator[CropBatch], *, steps: int) -> float:
    """Seconds of a step in a row of `steps`, all of the device's work included."""
    _wait()
    begin_s = time.perf_counter()
    for step in range(steps):
        training.take(step, list(islice(batches, training.batch.accumulation)))
    _wait()
    return (time.perf_counter() - begin_s) / steps


def benchmark_loader(stage: Stage) -> Iterator[tuple[str, Figures]]:
    """Images per second of the loader alone, and of ViT-S steps with it; nothing without --shards."""
    if not stage.shards:
        return
    context, run = start_processes(), read_noise_run(Size("vits", 128), stage)
    training = NoiseTraining(run, context=context)
    for workers in (2,) if stage.is_rehearsal else (4, 8, 14):
        if f"{workers} workers" in stage.known:
            continue
        steps = 2 if stage.is_rehearsal else 20
        with open_feed(run, stage, workers=workers, steps=steps + 2) as stream:
            next(stream)
            begin_s = time.perf_counter()
            images = sum(len(next(stream).images) for _ in range(steps))
            alone = images / (time.perf_counter() - begin_s)
        with open_feed(run, stage, workers=workers, steps=steps + 4) as stream:
            time_steps(training, stream, steps=4)
            step_s = time_steps(training, stream, steps=steps)
        yield f"{workers} workers", {"loader_images_per_s": alone, **_rate(training, step_s, context)}
    stop_processes()


def open_feed(run: Run, stage: Stage, *, workers: int, steps: int) -> BatchStream:
    """The loader of `run` on the stage's shards."""
    data = DataConfig(shards=stage.shards, workers=workers)
    shards, batch = open_shards(data.shards, data=data), plan_batch(run.deepspeed, ranks=1)
    return open_batches(
        shards,
        plan_data(shards, data, global_batch=batch.total, seed=0),
        views=run.cmae.views,
        data=data,
        rank=0,
        ranks=1,
        accumulation=batch.accumulation,
        first_step=0,
        end_step=steps,
        pin=not stage.is_rehearsal,
        bad=BadSamples(1.0),
    )


def _rate(training: NoiseTraining, step_s: float, context: RankContext) -> Figures:
    rate, peak = training.batch.total / step_s, read_peak_flops(context.device)
    figures: Figures = {"ms_per_step": 1e3 * step_s, "images_per_s": rate}
    if peak is not None:
        figures["mfu"] = training.task.image_flops * rate / peak
    return {**figures, "attention": describe_attention(training.state.attention)}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
