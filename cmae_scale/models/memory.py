"""Memory of one rank at each fuller moment of an optimizer step. The largest moment is what must fit.

A test compares it with the tensors that are alive in real steps of every stage, `python -m cmae_scale.bench
memory` with what the operating system counts.
"""

from typing import NamedTuple

from cmae_scale.core.settings import CmaeConfig
from cmae_scale.models.activations import (
    BlockShape,
    count_activations,
    count_passing,
    count_transient,
    decoder_block,
    encoder_block,
)
from cmae_scale.models.flops import count_kept
from cmae_scale.models.parameters import count_parameters
from cmae_scale.models.zero import Device, Job, count_standing

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
        idle._replace(name="views", views=ready + job.batch.local * pair, working=group * _VIEW_TEMPORARIES),
        passing._replace(
            name="forward of the target",
            gradients=held.gradients + carried,
            buckets=open_buckets,
            working=micro * count_passing(target, formats=job.formats) if cfg.has_contrast else 0,
        ),
        passing._replace(
            name="backward of the decoders",
            gradients=held.gradients + carried,
            # a GPU gives whole buffers at once, on a CPU nothing has been written to new ones yet
            buckets=held.buckets + held.sending if job.device == "cuda" else open_buckets,
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
        idle._replace(
            name="optimizer",
            views=ready,
            gradients=held.gradients + held.flattened,
            working=held.updating,
        ),
        idle._replace(name="average", views=ready, working=held.averaged),
    ]


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
