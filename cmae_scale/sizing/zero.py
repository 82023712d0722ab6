"""What each ZeRO stage keeps on a rank whatever the micro-batch: DeepSpeed's rules as arithmetic on integers.

Read from its source (0.19.8: runtime/zero/stage_1_and_2.py, stage3.py, runtime/engine.py) and compared by a
test with the tensors that are alive in real steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.precision import NumberFormats
from cmae_scale.sizing.activations import Kernel, Method
from cmae_scale.sizing.parameters import (
    count_buffers,
    count_parameters,
    count_reordered,
    count_rounded,
    count_sent_rounded,
)

Device = Literal["cuda", "cpu"]

_FP32 = 4
_ADAM = 8  # two fp32 moments of each weight
_ALLREDUCE = 500_000_000  # numbers that stage 0 reduces at once. Source: runtime/engine.py


@dataclass(frozen=True)
class ZeroSettings:
    """What DeepSpeed's zero_optimization says about memory. Buckets and limits are counted in numbers."""

    stage: int
    ranks: int
    reduce_bucket: int
    overlaps: bool
    is_contiguous: bool
    prefetch: int
    max_live: int
    max_reuse: int
    offloads_optimizer: bool
    offloads_parameters: bool

    def share(self, numbers: int) -> int:
        """One rank's part of what is split over all."""
        return -(-numbers // self.ranks)


def read_zero(settings: Mapping[str, Any], *, ranks: int) -> ZeroSettings:
    """The settings of a ds_config with DeepSpeed's defaults. Source: deepspeed/runtime/zero/config.py."""
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)

    def number(name: str, default: float) -> int:
        value = zero.get(f"stage3_{name}", zero.get(name))
        return int(default if value in (None, "auto") else value)

    def offloads(name: str) -> bool:
        return bool((zero.get(name) or {}).get("device", "none") != "none")

    overlaps = zero.get("overlap_comm")
    return ZeroSettings(
        stage=stage,
        ranks=ranks,
        reduce_bucket=number("reduce_bucket_size", 5e8),
        overlaps=bool(stage == 3 if overlaps in (None, "auto") else overlaps),
        is_contiguous=bool(zero.get("contiguous_gradients", True)),
        prefetch=number("prefetch_bucket_size", 5e7),
        max_live=number("max_live_parameters", 1e9),
        max_reuse=number("max_reuse_distance", 1e9),
        offloads_optimizer=stage > 0 and offloads("offload_optimizer"),
        offloads_parameters=stage == 3 and offloads("offload_param"),
    )


def is_optimizer_fused(settings: Mapping[str, Any]) -> bool:
    """Whether the update makes no temporaries as large as the weights. DeepSpeed's own Adam makes none."""
    params = settings.get("optimizer", {}).get("params", {})
    return bool(params.get("fused", False) or not params.get("torch_adam", False))


class Job(NamedTuple):
    """What decides the memory of a rank."""

    cfg: CmaeConfig
    formats: NumberFormats
    zero: ZeroSettings
    batch: BatchSizes
    kernel: Kernel
    device: Device = "cuda"
    is_fused: bool = True  # the optimizer: see `is_optimizer_fused`

    @property
    def method(self) -> Method:
        """How the passes are run."""
        return Method(self.formats, self.kernel, self.cfg.model.remat)


class StaticMemory(NamedTuple):
    """Bytes that a stage brings along whatever the micro-batch, on the device."""

    weights: int  # of the trained parts, between steps
    gathered: int  # of them and of the target, more of it while the forward pass runs
    regathered: int  # and while backward runs
    optimizer: int
    target: int
    gradients: int  # between steps
    carried: int  # beyond those, from one micro-batch to the next
    reduced: int  # beyond `gradients`, when the last backward ends
    flattened: int  # beyond `gradients`, when the optimizer steps
    buckets: int  # between steps
    sending: int  # beyond those, during backward
    copies: int  # of what stages 0 to 2 are sending to other ranks
    updating: int  # temporaries of an optimizer that is not fused: a root and a quotient of each weight
    averaged: int  # when the target follows
    rehearsed: int  # beyond everything above, when the engine starts


def count_static(job: Job) -> StaticMemory:
    """The rules of the job's stage."""
    match job.zero.stage:
        case 0:
            return _hold_everything(job)
        case 3:
            return _split_weights(job)
        case _:
            return _split_optimizer(job)


def _hold_everything(job: Job) -> StaticMemory:
    """Stage 0: torch's optimizer on whole weights, or DeepSpeed's on rounded ones; it reduces at the end."""
    size, trained, target = _sizes(job)
    is_coarse = size < _FP32  # the engine runs on rounded weights and keeps fp32 masters beside them
    return StaticMemory(
        weights=size * trained + _FP32 * count_buffers(job.cfg),
        gathered=_copied_bytes(job),
        # blocks that are computed again round their weights again
        regathered=_copied_bytes(job) if job.cfg.model.remat == "none" else _reordered_bytes(job),
        optimizer=(_ADAM + _FP32 * is_coarse) * trained,
        target=(size + _FP32 * is_coarse) * target,
        gradients=0,
        carried=size * trained,
        reduced=size * trained,
        flattened=(size + _FP32 * is_coarse) * trained,
        buckets=0,
        sending=0,
        copies=min(trained, _ALLREDUCE) * size if job.zero.ranks > 1 else 0,
        # on a CPU torch updates one tensor after the other, on a GPU all at once
        updating=2 * _FP32 * trained * (job.device == "cuda") * (not job.is_fused),
        averaged=_FP32 * target * is_coarse,
        # it steps once with zero gradients: runtime/fp16/unfused_optimizer.py
        rehearsed=(size + _FP32) * trained * is_coarse,
    )


def _split_optimizer(job: Job) -> StaticMemory:
    """Stages 1 and 2: whole weights in one tensor, a part of masters and moments, gradients in buckets."""
    size, trained, target = _sizes(job)
    zero, is_coarse, part = job.zero, size < _FP32, job.zero.share(trained)
    accumulates, on_device = job.batch.accumulation > 1, not job.zero.offloads_optimizer
    if zero.stage == 1:
        reduced = trained if accumulates or not zero.overlaps else part
    else:
        reduced = part * (1 + accumulates)
    return StaticMemory(
        weights=size * trained + _FP32 * count_buffers(job.cfg),
        gathered=_copied_bytes(job),
        # blocks that are computed again round their weights again
        regathered=_copied_bytes(job) if job.cfg.model.remat == "none" else _reordered_bytes(job),
        # an fp32 master of this rank's part, also where the weights are fp32 already
        optimizer=(_ADAM + _FP32) * part * on_device,
        target=(size + _FP32 * is_coarse) * target,
        gradients=0,
        carried=size * (trained if zero.stage == 1 else part) * on_device,
        reduced=size * reduced * on_device,
        flattened=(2 * size + _FP32 * is_coarse) * part * on_device,
        buckets=0,
        sending=_bucket_bytes(job, sizes=(size, size), is_doubled=zero.overlaps),
        # it flattens a bucket once more before it sends it: allreduce_bucket
        copies=_largest_bucket_bytes(job) if zero.ranks > 1 else 0,
        updating=2 * _FP32 * part * on_device * (not job.is_fused),
        averaged=_FP32 * target * is_coarse,
        rehearsed=0,
    )


def _split_weights(job: Job) -> StaticMemory:
    """Stage 3: a part of everything, and whole weights while they are in use.

    DeepSpeed keeps what is used again within max_reuse_distance: a model below half of it stays gathered from
    forward to backward. Under accumulation it often does not, so this is then an upper bound.
    """
    size, trained, target = _sizes(job)
    zero, is_coarse, part = job.zero, size < _FP32, job.zero.share(trained)
    on_device, stays = not zero.offloads_optimizer, not zero.offloads_parameters
    whole = min(trained + target, zero.max_reuse // 2 + min(zero.prefetch, zero.max_live))
    rounded = _copied_bytes(job) if job.formats.is_autocast else 0  # blocks are gathered whole, then rounded
    alone = _copied_bytes(job) // 2 if stays else size * whole  # one rank's parts are the weights themselves
    return StaticMemory(
        weights=size * part * stays + _FP32 * count_buffers(job.cfg),
        gathered=size * whole + rounded if zero.ranks > 1 else alone,
        regathered=size * whole + rounded if zero.ranks > 1 else alone,
        optimizer=(_ADAM + _FP32) * part * on_device,
        target=(size * stays + _FP32 * is_coarse) * zero.share(target),
        gradients=size * part * on_device,
        carried=0,
        reduced=0,
        flattened=(size + _FP32 * is_coarse) * part * on_device,
        buckets=_bucket_bytes(job, sizes=(job.formats.compute_bytes, size), is_doubled=False),
        sending=0,
        copies=0,
        updating=2 * _FP32 * part * on_device * (not job.is_fused),
        averaged=0,
        rehearsed=0,
    )


def count_host(job: Job) -> int:
    """Bytes of main memory that a rank's offloaded state takes."""
    zero, size = job.zero, job.formats.parameter_bytes
    counts = count_parameters(job.cfg)
    part, optimizer, parameters = zero.share(counts.trained), 0, 0
    if zero.offloads_optimizer:  # master, moments, gradient in fp32; a rounded copy or the flat gradients
        optimizer = (2 * _FP32 + _ADAM + size) * part
    if zero.offloads_parameters:
        parameters = size * (part + zero.share(counts.target))
    return optimizer + parameters


def count_snapshot(job: Job) -> int:
    """Bytes of main memory for the copy from which a rank's checkpoint is written beside training.

    Of each trained weight a master and two moments, of the target its average, both in fp32: dealt out evenly
    whatever the stage.
    """
    if not job.cfg.checkpoint.beside:
        return 0
    counts = count_parameters(job.cfg)
    return ((_FP32 + _ADAM) * counts.trained + _FP32 * counts.target) // job.zero.ranks


def _sizes(job: Job) -> tuple[int, int, int]:
    """Bytes of a weight, trained weights, target weights."""
    counts = count_parameters(job.cfg)
    return job.formats.parameter_bytes, counts.trained, counts.target


def _copied_bytes(job: Job) -> int:
    """Of the copies of whole weights that are kept for backward: autocast's, or those in another order."""
    if not job.formats.is_autocast:
        return _reordered_bytes(job)
    return job.formats.compute_bytes * count_rounded(job.cfg)


def _reordered_bytes(job: Job) -> int:
    """Of the copies that stand outside of blocks, so that no recomputation makes them again."""
    return job.formats.compute_bytes * count_reordered(job.cfg.model)


def _bucket_bytes(job: Job, *, sizes: tuple[int, int], is_doubled: bool) -> int:
    """Bytes of the buffers that gradients are sent in; `sizes` of a number are for products and for the rest.

    Under autocast DeepSpeed has one for most products' weights, sent in its format, and one for the rest. On
    a GPU a buffer is taken whole, however small the model; on a CPU only pages that are written count.
    """
    zero = job.zero
    if not zero.is_contiguous:
        return min(zero.reduce_bucket, count_parameters(job.cfg).trained) * sizes[1]
    total = 0
    for numbers, size in zip(_count_sent(job), sizes, strict=True):
        whole = zero.reduce_bucket * (2 if is_doubled else 1) * (numbers > 0)
        total += size * (whole if job.device == "cuda" else min(whole, numbers))
    return total


def _largest_bucket_bytes(job: Job) -> int:
    """Bytes of the largest bucket that is sent at once."""
    size = job.formats.parameter_bytes
    return size * max(min(job.zero.reduce_bucket, numbers) for numbers in _count_sent(job))


def count_gradient_bytes(job: Job) -> int:
    """Of all gradients of a rank in the formats that they are sent in."""
    narrow, rest = _count_sent(job)
    return narrow * job.formats.compute_bytes + rest * job.formats.parameter_bytes


def _count_sent(job: Job) -> tuple[int, int]:
    """Numbers of gradients that go into the bucket for products, and into the one for the rest."""
    narrow = count_sent_rounded(job.cfg) if job.formats.is_autocast else 0
    return narrow, count_parameters(job.cfg).trained - narrow
