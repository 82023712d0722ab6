"""Memory of one rank at each fuller moment of an optimizer step, as arithmetic on integers.

Which tensors DeepSpeed holds when is read from its source (0.19.8, named beside each rule) and compared by a
test with the tensors that are alive in a real step of each stage. The largest moment is what must fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cmae_scale.core.batches import BatchSizes
from cmae_scale.core.precision import NumberFormats
from cmae_scale.core.settings import CmaeConfig
from cmae_scale.models.activations import (
    BlockShape,
    Kernel,
    Method,
    count_activations,
    count_passing,
    count_transient,
    decoder_block,
    encoder_block,
)
from cmae_scale.models.flops import count_kept
from cmae_scale.models.parameters import count_buffers, count_parameters, count_rounded

Device = Literal["cuda", "cpu"]

_FP32 = 4
_ADAM = 8  # two fp32 moments of each weight
_ALLREDUCE = 500_000_000  # numbers that stage 0 reduces at once. Source: runtime/engine.py
# images whose views are made together: see augment/views.py. Temporaries come to about four of their views
_VIEW_GROUP: dict[Device, int] = {"cuda": 2**28, "cpu": 2**22}
_VIEW_TEMPORARIES = 4


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
        return (zero.get(name) or {}).get("device", "none") != "none"

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


class Job(NamedTuple):
    """What decides the memory of a rank."""

    cfg: CmaeConfig
    formats: NumberFormats
    zero: ZeroSettings
    batch: BatchSizes
    kernel: Kernel
    device: Device = "cuda"

    @property
    def method(self) -> Method:
        """How the passes are run."""
        return Method(self.formats, self.kernel, self.cfg.model.remat)


class Standing(NamedTuple):
    """Bytes that a stage brings along whatever the micro-batch, on the device."""

    weights: int  # of the trained parts, between steps
    gathered: int  # of them and of the target, more of it during the passes
    optimizer: int
    target: int
    gradients: int  # between steps
    carried: int  # beyond those, from one micro-batch to the next
    reduced: int  # beyond `gradients`, when the last backward ends
    flattened: int  # beyond `gradients`, when the optimizer steps
    buckets: int  # between steps
    sending: int  # beyond those, during backward
    copies: int  # when stage 0 reduces
    averaged: int  # when the target follows
    rehearsed: int  # beyond everything above, when the engine starts


class Moment(NamedTuple):
    """Bytes that a rank holds at one moment of a step, by what they are for; `name` says which moment."""

    name: str
    weights: int  # of the trained parts, also gathered or rounded copies
    optimizer: int  # Adam's moments and fp32 masters
    target: int  # its weights and masters
    gradients: int
    buckets: int  # what gradients are sent in
    views: int  # uint8 masters and both views
    activations: int
    working: int  # operations under way

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self[1:])


def count_standing(job: Job) -> Standing:
    """The stage's rules. Source: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, engine.py (0.19.8)."""
    zero, size = job.zero, job.formats.parameter_bytes
    counts = count_parameters(job.cfg)
    trained, target = counts.trained, counts.target
    buffers = _FP32 * count_buffers(job.cfg)
    is_coarse = size < _FP32  # the engine runs on rounded weights and keeps fp32 masters beside them
    rounded = job.formats.compute_bytes * count_rounded(job.cfg) if job.formats.is_autocast else 0
    masters = _FP32 * target if is_coarse else 0
    if zero.stage == 0:
        copy = min(trained, _ALLREDUCE) * size if zero.ranks > 1 else 0
        return Standing(
            weights=size * trained + buffers,
            gathered=rounded,
            optimizer=_ADAM * trained + (_FP32 * trained if is_coarse else 0),
            target=size * target + masters,
            gradients=0,
            carried=size * trained,
            reduced=size * trained,
            flattened=(size + (_FP32 if is_coarse else 0)) * trained,
            buckets=0,
            sending=0,
            copies=copy,
            averaged=masters,
            # it steps once with zero gradients: runtime/fp16/unfused_optimizer.py
            rehearsed=(size + _FP32) * trained if is_coarse else 0,
        )
    part = zero.share(trained)
    master = _FP32 * part  # also where the weights are fp32 already: a copy of this rank's part
    moments = _ADAM * part
    on_device = not zero.offloads_optimizer
    flattened = size * part + (_FP32 * part if is_coarse else 0)
    if zero.stage == 3:
        whole = min(trained + target, zero.max_reuse // 2 + min(zero.prefetch, zero.max_live))
        gathered = size * whole if zero.ranks > 1 else rounded // 2
        local = size * part * (not zero.offloads_parameters)
        return Standing(
            weights=local + buffers,
            gathered=gathered + (size * part if zero.offloads_parameters else 0),
            optimizer=(master + moments) * on_device,
            target=size * zero.share(target) * (not zero.offloads_parameters)
            + (_FP32 * zero.share(target) if is_coarse else 0),
            gradients=size * part * on_device,
            carried=0,
            reduced=0,
            flattened=flattened * on_device,
            buckets=_count_buckets(job, of=(job.formats.compute_bytes, size), doubled=False),
            sending=0,
            copies=0,
            averaged=0,
            rehearsed=0,
        )
    holds_all = zero.stage == 1 and (job.batch.accumulation > 1 or not zero.overlaps)
    is_carrying = zero.stage == 2 and job.batch.accumulation > 1
    return Standing(
        weights=size * trained + buffers,
        gathered=rounded,
        optimizer=(master + moments) * on_device,
        target=size * target + masters,
        gradients=0,
        carried=size * (trained if zero.stage == 1 else part) * on_device,
        reduced=size * (trained if holds_all else part * (1 + is_carrying)) * on_device,
        flattened=(size * part + flattened) * on_device,
        buckets=0,
        sending=_count_buckets(job, of=(size, size), doubled=zero.overlaps),
        copies=0,
        averaged=masters,
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


def plan_moments(job: Job) -> list[Moment]:
    """The moments at which a step can be fullest, in their order."""
    cfg, micro, accumulation = job.cfg, job.batch.micro, job.batch.accumulation
    held, parts, pair = count_standing(job), count_activations(cfg, method=job.method), _view_bytes(cfg)
    masters = 3 * (2 if cfg.views.target_crop == "random" else 1) * cfg.views.master_px**2
    ready = job.batch.local * (pair + masters) + micro * masters * (job.device == "cuda")  # one batch ahead
    group = min(micro * pair // (2 if cfg.has_contrast else 1), _VIEW_GROUP[job.device])
    logits = 2 * _FP32 * job.batch.total * micro if cfg.has_contrast else 0
    encoder, decoder, target = _block_shapes(cfg)
    carried = held.carried if accumulation > 1 else 0
    # stage 1 gives its buckets back after the whole step, stage 2 after each pass
    open_buckets = held.buckets + (held.sending if accumulation > 1 and job.zero.stage == 1 else 0)
    # backward adds the encoder's gradients last, when only its activations are left
    counts = count_parameters(cfg)
    share = 1 - counts.online_encoder / counts.trained
    arrived = max(carried, round(held.reduced * share)) if job.zero.stage in (0, 2) or carried else 0
    idle = Moment("", held.weights, held.optimizer, held.target, held.gradients, held.buckets, 0, 0, 0)
    passing = idle._replace(weights=held.weights + held.gathered, views=ready)
    return [
        idle._replace(name="start", working=held.rehearsed),
        # the views of the step before are still held while the next ones are made
        idle._replace(
            name="views", views=ready + job.batch.local * pair, working=group * _VIEW_TEMPORARIES
        ),
        passing._replace(
            name="forward of the target",
            gradients=held.gradients + carried,
            buckets=open_buckets,
            working=micro * count_passing(target, formats=job.formats) if cfg.has_contrast else 0,
        ),
        passing._replace(
            name="backward of the decoders",
            gradients=held.gradients + carried,
            buckets=held.buckets + held.sending,
            activations=micro * sum(parts),
            working=logits + micro * count_transient(decoder, method=job.method),
        ),
        passing._replace(
            name="backward of the encoder",
            gradients=held.gradients + arrived,
            buckets=held.buckets + held.sending,
            activations=micro * parts.online_encoder,
            working=micro * count_transient(encoder, method=job.method),
        ),
        passing._replace(
            name="end of backward",
            weights=held.weights,
            gradients=held.gradients + held.reduced,
            buckets=held.buckets + held.sending + held.copies,
        ),
        idle._replace(name="optimizer", views=ready, gradients=held.gradients + held.flattened),
        idle._replace(name="average", views=ready, working=held.averaged),
    ]


def predict_peak(job: Job) -> Moment:
    """The fullest moment of a step."""
    return max(plan_moments(job), key=lambda moment: moment.total_bytes)


def _count_buckets(job: Job, *, of: tuple[int, int], doubled: bool) -> int:
    """Bytes of the buffers that gradients are sent in; `of` is a number's size for products and for the rest.

    Under autocast DeepSpeed has one for the linear layers, sent in its format, and one for everything else. On
    a GPU a buffer is taken whole, however small the model; on a CPU only pages that are written count.
    """
    zero, counts = job.zero, count_parameters(job.cfg)
    if not zero.is_contiguous:
        return min(zero.reduce_bucket, counts.trained) * of[1]
    linear = count_rounded(job.cfg) if job.formats.is_autocast else 0
    total = 0
    for numbers, size in ((linear, of[0]), (counts.trained - linear, of[1])):
        if numbers == 0:
            continue
        copies = 2 if doubled and (job.device == "cuda" or numbers > zero.reduce_bucket) else 1
        filled = zero.reduce_bucket if job.device == "cuda" else min(zero.reduce_bucket, numbers)
        total += copies * filled * size
    return total


def _block_shapes(cfg: CmaeConfig) -> tuple[BlockShape, BlockShape, BlockShape]:
    """The blocks of the online encoder, of the wider decoder, and of the target encoder."""
    grid = cfg.views.img_px // cfg.model.patch_size
    kept, seen = (
        count_kept(grid, cell=cfg.mask.cell, ratio=ratio) for ratio in (cfg.mask.ratio, cfg.target.mask_ratio)
    )
    return (
        encoder_block(cfg, tokens=kept + 1),
        decoder_block(cfg.model.pixel_decoder, tokens=grid**2 + 1),
        encoder_block(cfg, tokens=seen + 1),
    )


def _view_bytes(cfg: CmaeConfig) -> int:
    """Of one image's views; a plain MAE has one."""
    return (2 if cfg.has_contrast else 1) * 3 * cfg.views.img_px**2 * _FP32
