"""Which ZeRO stage, rematerialisation and micro-batch fit a device, and which of them is fastest."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.cmae import Remat
from cmae_scale.sizing.memory import Moment, predict_peak
from cmae_scale.sizing.zero import Job, count_host

STAGES = (0, 1, 2, 3)
REMATS: tuple[Remat, ...] = get_args(Remat)

# What recomputation does to the time of a step. Source: measured on a CPU, ViT-S in bf16; full is also what
# counting the operations of the trained blocks' forward pass gives.
REPEATED = {"none": 1.0, "selective": 1.10, "full": 1.28}

# On a GPU beside torch's tensors: CUDA's context, cuBLAS's and NCCL's buffers. Assumed, not measured.
CONTEXT_BYTES = round(1.5 * 2**30)
# On a CPU beside tensors: the interpreter with torch and DeepSpeed. Source: tests/bench/records/memory.json
PROCESS_BYTES = round(0.85 * 2**30)
SMALL_MICRO = 32  # images per pass below which a large GPU waits for its launches. An assumption
FRAGMENTED = 0.05  # of the tensors' bytes, lost between the allocator's blocks. An assumption as well


class Layout(NamedTuple):
    """One choice: what it takes at the run's own micro-batch, and how far the micro-batch could grow."""

    stage: int
    remat: Remat
    peak: Moment
    device_bytes: int  # with what the device needs beside tensors
    host_bytes: int  # of offloaded state, per rank
    fits: bool
    largest: BatchSizes | None  # that fits and keeps the batch equation; None if not even one image does


def plan_layouts(job: Job, *, capacity_bytes: float) -> list[Layout]:
    """All stages under all ways of rematerialisation, on a device of `capacity_bytes`."""
    layouts = []
    for stage in STAGES:
        for remat in REMATS:
            choice = choose(job, stage=stage, remat=remat)
            peak = predict_peak(choice)
            taken = on_device(peak, device=job.device)
            layouts.append(
                Layout(
                    stage,
                    remat,
                    peak,
                    taken,
                    count_host(choice),
                    fits=taken <= capacity_bytes,
                    largest=find_largest(choice, capacity_bytes=capacity_bytes),
                )
            )
    return layouts


def choose(job: Job, *, stage: int, remat: Remat) -> Job:
    """The same job under another stage and rematerialisation; an overlap_comm left out follows the stage."""
    zero = job.zero
    if stage != zero.stage:
        overlaps = stage == 3 if zero.overlaps == (zero.stage == 3) else zero.overlaps
        zero = replace(
            zero,
            stage=stage,
            overlaps=overlaps,
            offloads_optimizer=zero.offloads_optimizer and stage > 0,
            offloads_parameters=zero.offloads_parameters and stage == 3,
        )
    model = job.cfg.model.model_copy(update={"remat": remat})
    return job._replace(cfg=job.cfg.model_copy(update={"model": model}), zero=zero)


def on_device(peak: Moment, *, device: str) -> int:
    """Bytes that the device, or on a CPU the process, shows as used."""
    if device == "cpu":
        return peak.total_bytes + PROCESS_BYTES
    return round(peak.total_bytes * (1 + FRAGMENTED)) + CONTEXT_BYTES


def find_largest(job: Job, *, capacity_bytes: float) -> BatchSizes | None:
    """The largest micro-batch that fits among those that keep train_batch_size on these ranks."""
    for batch in divide(job.batch, ranks=job.zero.ranks):
        if on_device(predict_peak(job._replace(batch=batch)), device=job.device) <= capacity_bytes:
            return batch
    return None


def divide(batch: BatchSizes, *, ranks: int) -> Iterator[BatchSizes]:
    """All ways to take a rank's share of the batch in equal micro-batches, the largest first."""
    local = batch.total // ranks
    for accumulation in range(1, local + 1):
        if local % accumulation == 0:
            yield BatchSizes(total=batch.total, micro=local // accumulation, accumulation=accumulation)


def recommend(layouts: list[Layout], *, ranks: int) -> Layout | None:
    """What should be fastest of what fits: nothing recomputed, no tiny micro-batches, little work per step.

    Source of the order of stages: DeepSpeed's host time per tensor grows with the stage, and is least without
    any; but stage 0 sends all gradients after backward, where 1 and 2 overlap the two.
    """
    order = (0, 1, 2, 3) if ranks == 1 else (1, 2, 0, 3)

    def cost(layout: Layout) -> tuple[bool, float, int]:
        assert layout.largest is not None
        is_tiny = layout.largest.micro < min(SMALL_MICRO, layout.largest.local)
        return is_tiny, REPEATED[layout.remat], order.index(layout.stage)

    return min((layout for layout in layouts if layout.largest), key=cost, default=None)
