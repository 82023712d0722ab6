"""Memory of one rank at each fuller moment of an optimizer step. The largest moment is what must fit.

A test compares it with the tensors that are alive in real steps of every stage, `python -m cmae_scale.bench
memory` with what the operating system counts.
"""

from itertools import accumulate
from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.sizes import count_prefix
from cmae_scale.sizing.activations import (
    BlockShape,
    EncoderStage,
    count_activations,
    count_transient,
    decoder_block,
    plan_encoder,
)
from cmae_scale.sizing.flops import count_kept
from cmae_scale.sizing.parameters import count_encoder, count_parameters
from cmae_scale.sizing.zero import Device, Job, StaticMemory, count_static

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
    views: int  # and the uint8 images that they are cut from
    activations: int
    working: int  # operations under way

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self[1:])


def plan_moments(job: Job) -> list[Moment]:
    """The moments at which a step can be fullest, in their order."""
    held, masters = count_static(job), _master_bytes(job)
    view = 3 * job.cfg.views.img_px**2 * _FP32
    # under accumulation the target's pass comes first, for the whole batch: each pass has its own view
    both = job.cfg.has_contrast and job.batch.accumulation == 1
    views = masters + job.batch.micro * view * (2 if both else 1)
    group = min(job.batch.micro * view, _VIEW_GROUP[job.device])
    idle = Moment("", held.weights, held.optimizer, held.target, held.gradients, held.buckets, 0, 0, 0)
    between = masters * (job.device == "cpu")  # a step's images lie in main memory until it is over
    return [
        idle._replace(name="start", working=held.rehearsed),
        idle._replace(name="views", views=views, working=group * _VIEW_TEMPORARIES),
        *_plan_passes(job, held, idle=idle._replace(views=views)),
        idle._replace(
            name="optimizer",
            views=between,
            gradients=held.gradients + held.flattened,
            working=held.updating,
        ),
        idle._replace(name="average", views=between, working=held.averaged),
    ]


def _plan_passes(job: Job, held: StaticMemory, *, idle: Moment) -> list[Moment]:
    """The last micro-batch's forward and backward pass."""
    cfg, micro, parts = job.cfg, job.batch.micro, count_activations(job.cfg, method=job.method)
    encoder, target = _plan_encoders(job)
    decoder = count_transient(_decoder_shape(cfg), method=job.method)
    logits = 2 * _FP32 * job.batch.total * micro if cfg.has_contrast else 0
    carried = held.gradients + (held.carried if job.batch.accumulation > 1 else 0)
    # stage 1 gives its buckets back after the whole step, stage 2 after each pass; but stage 1 writes to them
    # in the last pass alone, and on a CPU what nothing was written to takes no memory
    keeps_buckets = job.batch.accumulation > 1 and job.zero.stage == 1 and job.device == "cuda"
    open_buckets = held.buckets + held.sending * keeps_buckets
    sending = held.buckets + held.sending
    forward = idle._replace(weights=held.weights + held.gathered, gradients=carried, buckets=open_buckets)
    backward = forward._replace(weights=held.weights + held.regathered, buckets=sending)
    arrival = _plan_arrival(job, held)
    left = (
        sum(stage.kept * share for stage, share in zip(encoder, arrival.encoder_left, strict=True))
        + sum(parts[1:]) * arrival.decoders_left
    )
    # the stage that backward is in by then
    entered = max((place for place, share in enumerate(arrival.encoder_left) if share), default=0)
    return [
        forward._replace(
            name="forward of the target",
            working=micro * max(stage.passing for stage in target) if cfg.has_contrast else 0,
        ),
        forward._replace(name="end of forward", activations=micro * sum(parts), working=logits),
        backward._replace(
            name="backward of the decoders",
            # a GPU gives whole buffers at once, on a CPU nothing has been written to new ones yet
            buckets=sending if job.device == "cuda" else open_buckets,
            activations=micro * sum(parts),
            working=logits + micro * decoder,
        ),
        backward._replace(
            name="first full bucket",
            gradients=max(carried, arrival.at_bucket),
            activations=round(micro * left),
            working=micro * (decoder if arrival.decoders_left else encoder[entered].transient),
        ),
        *(
            backward._replace(
                name=f"backward of the {encoder[place].name}",
                gradients=max(carried, held.gradients + arrival.at_stages[place]),
                activations=micro * sum(stage.kept for stage in encoder[: place + 1]),
                working=micro * encoder[place].transient,
            )
            for place in reversed(range(len(encoder)))
        ),
        backward._replace(
            name="end of backward",
            weights=held.weights,
            gradients=held.gradients + held.reduced,
            buckets=sending + held.copies,
        ),
    ]


class _Arrival(NamedTuple):
    """When the first bucket is full: gradients and shares of the activations that backward has not freed yet.

    And the gradients that are there when backward enters a stage of the encoder. All beyond those that stand;
    stages in forward order.
    """

    at_bucket: int
    at_stages: tuple[int, ...]
    decoders_left: float
    encoder_left: tuple[float, ...]


def _plan_arrival(job: Job, held: StaticMemory) -> _Arrival:
    """What is left of the activations when the first bucket is full, and which gradients have come.

    Backward meets the decoders first, the encoder's first stage last. Stage 0 piles gradients up as they
    come. Stages 1 and 2 gather a bucket full of them, then lay out this rank's share: on a GPU all at once.
    """
    trained, stages = count_parameters(job.cfg).trained, count_encoder(job.cfg.model, final_norm=True)
    before = [0, *accumulate(stages)]  # parameters of earlier stages
    come = [trained - until for until in before[1:]]  # when backward enters the stage
    if job.zero.stage not in (1, 2) or job.device == "cpu":
        piled = tuple(round(held.reduced * numbers / trained) for numbers in come)
        return _Arrival(0, piled, decoders_left=0, encoder_left=(0,) * len(stages))
    bucket = min(job.zero.reduce_bucket, trained)
    return _Arrival(
        at_bucket=held.reduced,
        at_stages=tuple(held.reduced if bucket < numbers else 0 for numbers in come),
        decoders_left=max(0, 1 - bucket / (trained - sum(stages))),
        encoder_left=tuple(
            min(1, max(0, (trained - bucket - earlier) / numbers))
            for earlier, numbers in zip(before[:-1], stages, strict=True)
        ),
    )


def predict_peak(job: Job) -> Moment:
    """The fullest moment of a step."""
    return max(plan_moments(job), key=lambda moment: moment.total_bytes)


def _plan_encoders(job: Job) -> list[tuple[EncoderStage, ...]]:
    """The stages of the online and of the target encoder."""
    cfg = job.cfg
    grid = cfg.views.img_px // cfg.model.patch_size
    return [
        plan_encoder(cfg, seen=count_kept(grid, cell=cfg.mask.cell, ratio=ratio), method=job.method)
        for ratio in (cfg.mask.ratio, cfg.target.mask_ratio)
    ]


def _decoder_shape(cfg: CmaeConfig) -> BlockShape:
    """A block of the wider decoder."""
    patches = (cfg.views.img_px // cfg.model.patch_size) ** 2
    return decoder_block(cfg.model.pixel_decoder, tokens=patches + count_prefix(cfg.model))


def count_loaded(job: Job) -> int:
    """Bytes of main memory that a rank's decoded images take: of the step being computed and of what is next.

    On a CPU `plan_moments` counts the step's own, so they are left out here. For a GPU they lie in memory
    that is page-locked, which torch takes in powers of two. Source: ATen/core/CachingHostAllocator.h.
    """
    batch, micro = job.batch, job.batch.micro * _master_size(job)
    ahead = job.cfg.data.count_ahead(batch.accumulation)
    if job.device == "cpu":
        return ahead * micro
    return (batch.accumulation + ahead) * (1 << (micro - 1).bit_length())


def _master_bytes(job: Job) -> int:
    """Of the images that views are cut from: on a GPU a micro-batch and the next one, else a whole step's."""
    ahead = 2 if job.batch.accumulation > 1 else 1
    images = job.batch.local if job.device == "cpu" else job.batch.micro * ahead
    return images * _master_size(job)


def _master_size(job: Job) -> int:
    """Bytes of what is decoded of one image."""
    crops = 2 if job.cfg.views.target_crop == "random" else 1
    return 3 * crops * job.cfg.views.master_px**2
