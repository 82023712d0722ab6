"""Training on random images, as the loop does it, for trials that need no shards."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmae_scale.config.batches import BatchSizes, plan_batch
from cmae_scale.config.run_file import Run, read_run, resolve_run
from cmae_scale.config.schedules import TargetMomentum
from cmae_scale.data.stream import CropBatch
from cmae_scale.engine.inputs import StepImages, draw_step
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.engine.pretraining import METRIC_NAMES, Pretraining
from cmae_scale.engine.process.group import RankContext
from cmae_scale.engine.setup import start_pretraining
from cmae_scale.engine.step_guard import NonFiniteGuard
from cmae_scale.models import CMAE

_STEPS = 1000  # of the schedules: none of the trials comes so far
# a model that takes no time, for a rehearsal
_TINY = (
    "cmae.model.encoder=null",
    *(f"cmae.model.{name}" for name in ("embed_dim=24", "depth=2", "num_heads=2", "patch_size=8")),
    *(f"cmae.model.pixel_decoder.{name}" for name in ("embed_dim=24", "depth=1", "num_heads=2")),
    *(f"cmae.model.feature_decoder.{name}" for name in ("embed_dim=24", "depth=1", "num_heads=2")),
    *(f"cmae.views.{name}" for name in ("img_px=32", "master_px=36", "shift_px=5")),
    "cmae.heads.hidden_dim=16",
    "cmae.heads.out_dim=16",
    # named, for on a CPU two trials may end otherwise, and runs are compared to the bit
    "cmae.model.attention=flash",
    'torch_autocast={"enabled": false}',
)


class Stage(NamedTuple):
    """Where and how much trials of a GPU measure; `known` are figures that are there already."""

    device: str  # "cuda", or "cpu" for a rehearsal with tiny models
    is_quick: bool
    scratch: str  # a folder for what runs write
    shards: tuple[str, ...] = ()  # for the loader
    known: frozenset[str] = frozenset()

    @property
    def is_rehearsal(self) -> bool:
        """Whether figures mean nothing."""
        return self.device == "cpu"


class Size(NamedTuple):
    """A shipped run file at a micro-batch, with changes."""

    run_file: str
    micro: int
    changes: tuple[str, ...] = ()
    accumulation: int = 1


def read_noise_run(size: Size, stage: Stage) -> Run:
    """The resolved run of one rank, with a time breakdown."""
    micro = min(size.micro, 4) if stage.is_rehearsal else size.micro
    sizes = (
        f"train_batch_size={micro * size.accumulation}",
        f"train_micro_batch_size_per_gpu={micro}",
        "cmae.monitor.breakdown=true",
        f"cmae.out={stage.scratch}/run",
    )
    tiny = _TINY if stage.is_rehearsal else ()
    run = read_run(f"ds_configs/{size.run_file}.json", [*sizes, *tiny, *size.changes])
    batch = plan_batch(run.deepspeed, ranks=1)
    return resolve_run(run, batch=batch, total_steps=_STEPS, warmup_steps=1)


def make_noise(run: Run, batch: BatchSizes, *, step: int, pin: bool) -> list[CropBatch]:
    """A rank's micro-batches of random images, from `step` alone."""
    views, rng = run.cmae.views, torch.Generator().manual_seed(step)
    crops = 2 if views.target_crop == "random" else 1
    shape = (batch.micro, crops, 3, views.master_px, views.master_px)
    parts = []
    for micro in range(batch.accumulation):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
        labels = torch.zeros(batch.micro, dtype=torch.int64)
        parts.append(CropBatch(images.pin_memory() if pin else images, labels, (), step, micro))
    return parts


def draw_noise(run: Run, *, step: int, device: torch.device) -> StepImages:
    """One rank's step of random images, with the random numbers of its views and masks."""
    batch = plan_batch(run.deepspeed, ranks=1)
    return StepImages(
        make_noise(run, batch, step=step, pin=False),
        draw_step(run.cmae, total=batch.total, step=step),
        first_row=0,
        cfg=run.cmae,
        has_target=run.cmae.has_contrast,
        device=device,
        timer=StepTimer(device, is_on=False),
    )


class BareEngine:
    """A model under autocast, if any, with what `accumulate_gradients` asks of an engine."""

    def __init__(self, model: CMAE, device: torch.device, autocast: torch.dtype | None) -> None:
        self.model, self.device, self.autocast = model, device, autocast

    def __call__(self, *views: Tensor | None, **noise: Tensor) -> Any:
        """The model's output."""
        with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model(*views, **noise)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        torch.autograd.backward(loss)

    def step(self) -> None:
        """Nothing is due between micro-batches."""


class NoiseTraining:
    """A run under way: `take(step, crops)` is a whole optimizer step as the loop takes it."""

    def __init__(self, run: Run, *, context: RankContext) -> None:
        self.batch = plan_batch(run.deepspeed, ranks=1)
        self.state = start_pretraining(run, context=context, data_order="noise")
        momentum = TargetMomentum(run.cmae.target.momentum, total_steps=_STEPS)
        self.task = Pretraining(self.state, self.batch, momentum)
        self.guard = NonFiniteGuard(self.state.engine, metric_names=METRIC_NAMES, device=context.device)

    def take(self, step: int, crops: Sequence[CropBatch]) -> torch.Tensor:
        """Losses of the step, on the device."""
        with self.state.use_attention():
            self.guard.open(step, keys=())
            return self.task.take_step(crops, step=step, update=self._update)

    def close(self) -> None:
        """Give its memory back: DeepSpeed's hooks would keep an engine of ZeRO 1 or 2 alive."""
        self.state.engine.destroy()

    def _update(self, losses: torch.Tensor) -> bool:
        with self.state.timer.span("step"):
            return self.guard.apply(losses)
