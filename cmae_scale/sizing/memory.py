"""Memory of one rank at each fuller moment of an optimizer step. The largest moment is what must fit.

A test compares it with the tensors that are alive in real steps of every stage, `python -m cmae_scale.bench
memory` with what the operating system counts.
"""

from typing import NamedTuple

from cmae_scale.core.settings import CmaeConfig
from cmae_scale.sizing.activations import (
    BlockShape,
    count_activations,
    count_passing,
    count_transient,
    decoder_block,
    encoder_block,
)
from cmae_scale.sizing.flops import count_kept
from cmae_scale.sizing.parameters import count_parameters
from cmae_scale.sizing.zero import Device, Job, Standing, count_standing

_FP32 = 4
# images whose views are made together: see augment/views.py. Temporaries come to about four of their views
_VIEW_GROUP: dict[Device, int] = {"cuda": 2**28, "cpu": 2**22}
_VIEW_TEMPORARIES = 4


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


def plan_moments(job: Job) -> list[Moment]:
    """The moments at which a step can be fullest, in their order."""
    cfg, micro, held = job.cfg, job.batch.micro, count_standing(job)
    pair = _view_bytes(cfg)
    masters = 3 * (2 if cfg.views.target_crop == "random" else 1) * cfg.views.master_px**2
    ready = job.batch.local * (pair + masters) + micro * masters * (job.device == "cuda")  # one batch ahead
    group = min(micro * pair // (2 if cfg.has_contrast else 1), _VIEW_GROUP[job.device])
    idle = Moment("", held.weights, held.optimizer, held.target, held.gradients, held.buckets, 0, 0, 0)
    return [
        idle._replace(name="start", working=held.rehearsed),
        # the views of the step before are still held while the next ones are made
        idle._replace(name="views", views=ready + job.batch.local * pair, working=group * _VIEW_TEMPORARIES),
        *_plan_passes(job, held, idle=idle._replace(views=ready)),
        idle._replace(
            name="optimizer",
            views=ready,
            gradients=held.gradients + held.flattened,
            working=held.updating,
        ),
        idle._replace(name="average", views=ready, working=held.averaged),
    ]


def _plan_passes(job: Job, held: Standing, *, idle: Moment) -> list[Moment]:
    """The last micro-batch's forward and backward pass."""
    cfg, micro, parts = job.cfg, job.batch.micro, count_activations(job.cfg, method=job.method)
    encoder, decoder, target = _block_shapes(cfg)
    logits = 2 * _FP32 * job.batch.total * micro if cfg.has_contrast else 0
    carried = held.gradients + (held.carried if job.batch.accumulation > 1 else 0)
    # stage 1 gives its buckets back after the whole step, stage 2 after each pass
    keeps_buckets = job.batch.accumulation > 1 and job.zero.stage == 1
    open_buckets = held.buckets + held.sending * keeps_buckets
    sending = held.buckets + held.sending
    forward = idle._replace(weights=held.weights + held.gathered, gradients=carried, buckets=open_buckets)
    backward = forward._replace(weights=held.weights + held.regathered, buckets=sending)
    left, arrived = _plan_arrival(job, held)
    return [
        forward._replace(
            name="forward of the target",
            working=micro * count_passing(target, formats=job.formats) if cfg.has_contrast else 0,
        ),
        forward._replace(name="end of forward", activations=micro * sum(parts), working=logits),
        backward._replace(
            name="backward of the decoders",
            # a GPU gives whole buffers at once, on a CPU nothing has been written to new ones yet
            buckets=sending if job.device == "cuda" else open_buckets,
            activations=micro * sum(parts),
            working=logits + micro * count_transient(decoder, method=job.method),
        ),
        backward._replace(
            name="first full bucket",
            gradients=max(carried, arrived.at_bucket),
            activations=round(micro * (parts.online_encoder * left.encoder + sum(parts[1:]) * left.decoders)),
            working=micro * count_transient(decoder if left.decoders else encoder, method=job.method),
        ),
        backward._replace(
            name="backward of the encoder",
            gradients=max(carried, held.gradients + arrived.at_encoder),
            activations=micro * parts.online_encoder,
            working=micro * count_transient(encoder, method=job.method),
        ),
        backward._replace(
            name="end of backward",
            weights=held.weights,
            gradients=held.gradients + held.reduced,
            buckets=sending + held.copies,
        ),
    ]


class _Arrived(NamedTuple):
    """Gradients, beyond those that stand, when the first bucket is full and when the encoder's begin."""

    at_bucket: int
    at_encoder: int


class _Left(NamedTuple):
    """Shares of the activations that backward has not freed yet."""

    decoders: float
    encoder: float


def _plan_arrival(job: Job, held: Standing) -> tuple[_Left, _Arrived]:
    """What is left of the activations when the first bucket is full, and which gradients have come.

    Backward meets the decoders first. Stage 0 piles gradients up as they come. Stages 1 and 2 gather a bucket
    full of them, then lay out this rank's share: on a GPU all of it at once.
    """
    counts = count_parameters(job.cfg)
    encoder, decoders = counts.online_encoder, counts.trained - counts.online_encoder
    if job.zero.stage not in (1, 2) or job.device == "cpu":
        return _Left(0, 0), _Arrived(0, round(held.reduced * decoders / counts.trained))
    bucket = min(job.zero.reduce_bucket, counts.trained)
    left = _Left(max(0, 1 - bucket / decoders), min(1, (counts.trained - bucket) / encoder))
    return left, _Arrived(held.reduced, held.reduced if left.decoders else 0)


def predict_peak(job: Job) -> Moment:
    """The fullest moment of a step."""
    return max(plan_moments(job), key=lambda moment: moment.total_bytes)


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
