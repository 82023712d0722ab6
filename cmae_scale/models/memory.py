"""Memory of one rank at each fuller moment of an optimizer step, as arithmetic on integers.

Which tensors DeepSpeed holds when is read from its source (0.19.8, named beside each rule) and compared by a
test with the tensors that are alive in a real step of each stage. The largest moment is what must fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cmae_scale.core.batches import BatchSizes
from cmae_scale.core.precision import NumberFormats
from cmae_scale.core.settings import CmaeConfig, Remat
from cmae_scale.models.activations import (
    Kernel,
    Method,
    count_activations,
    count_passing,
    count_transient,
    decoder_block,
    encoder_block,
)
from cmae_scale.models.flops import count_kept
from cmae_scale.models.parameters import count_block, count_buffers, count_parameters

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

    def with_choice(self, *, stage: int, remat: Remat, batch: BatchSizes | None = None) -> "Job":
        """The same job under another stage, rematerialisation and micro-batch."""
        zero = self.zero
        if stage != zero.stage:  # an unset overlap_comm follows the stage
            zero = ZeroSettings(**{**vars(zero), "stage": stage, "overlaps": zero.overlaps or stage == 3})
        model = self.cfg.model.model_copy(update={"remat": remat})
        return self._replace(
            cfg=self.cfg.model_copy(update={"model": model}), zero=zero, batch=batch or self.batch
        )


class Moment(NamedTuple):
    """Bytes that a rank holds at one moment of a step, by what they are for; `name` says which moment."""

    name: str
    weights: int  # of the trained parts: as split, and what is gathered or rounded of them
    optimizer: int  # Adam's moments and fp32 masters
    target: int  # its weights and masters
    gradients: int
    buckets: int  # in which gradients are sent
    views: int  # uint8 masters, both views, their making
    activations: int
    working: int  # of the operations under way

    @property
    def total(self) -> int:
        """All of it."""
        return sum(size for size in self[1:] if isinstance(size, int))


def plan_moments(job: Job) -> list[Moment]:
    """The moments at which a step can be fullest, in their order."""
    state, local, micro = _State.of(job), job.batch.local, job.batch.micro
    cfg, views = job.cfg, _view_bytes(job.cfg)
    masters = _master_bytes(cfg)
    parts = count_activations(cfg, method=job.method)
    logits = 2 * _FP32 * job.batch.total * micro if cfg.has_contrast else 0
    ready = local * (views + masters)
    group = min(micro * views // 2, _VIEW_GROUP[job.device]) * _VIEW_TEMPORARIES
    carried = state.carried_gradients if job.batch.accumulation > 1 else 0
    # stage 1 gives its buckets back at the end of the whole step, the others at the end of each pass
    kept_buckets = state.buckets if carried and job.zero.stage in (1, 3) else state.standing_buckets
    after_decoders = micro * parts.online_encoder
    every = micro * sum(parts)
    working = micro * max(count_transient(shape, method=job.method) for shape in job.trained_blocks)
    moments = [
        # the views of the step before are still held while the next ones are made
        state.moment("views", views=ready + local * views + group, buckets=state.standing_buckets),
        state.moment(
            "forward of the target",
            views=ready,
            gradients=carried,
            buckets=kept_buckets,
            working=micro * count_passing(job.target_block, formats=job.formats),
        ),
        state.moment(
            "backward of the decoders",
            views=ready,
            weights=state.gathered,
            gradients=carried + state.early_gradients(carried),
            buckets=state.buckets,
            activations=every,
            working=logits + working,
        ),
        state.moment(
            "backward of the encoder",
            views=ready,
            weights=state.gathered,
            gradients=state.gradients_after(1 - job.encoder_share) + carried * (job.zero.stage == 2),
            buckets=state.buckets,
            activations=after_decoders,
            working=micro * count_transient(job.trained_blocks[0], method=job.method),
        ),
        state.moment(
            "end of backward",
            views=ready,
            gradients=state.gradients_after(1.0) + carried * (job.zero.stage == 2),
            buckets=state.buckets,
            working=state.reduced_copy,
        ),
        state.moment(
            "optimizer",
            views=ready,
            gradients=state.step_gradients,
            buckets=state.standing_buckets,
        ),
        state.moment("average", views=ready, buckets=state.standing_buckets, working=state.average_copy),
    ]
    return moments
