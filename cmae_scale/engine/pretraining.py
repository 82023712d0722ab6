"""CMAE's training step as the paper has it: two views, two branches, two losses, update, moving average.

What the branches make of a view is in `models/cmae.py`, how views are drawn in `augment/`, the losses are in
`losses/`. What surrounds a step (its data, a step that goes wrong, log lines, checkpoints) is in `loop.py`.

Source: CMAE (arXiv:2207.13532) section 3 and figure 1.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.cmae import CmaeConfig, LossConfig
from cmae_scale.config.schedules import TargetMomentum
from cmae_scale.core.collectives import gather_rows
from cmae_scale.data.stream import CropBatch
from cmae_scale.engine.inputs import DrawsAhead, MicroBatch, StepImages
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.engine.train_state import TrainState
from cmae_scale.engine.zero.partitions import gather_weights
from cmae_scale.layers.tokens import TokenMask, patchify, take_tokens
from cmae_scale.losses import byol, infonce, pixel_loss
from cmae_scale.models.export import export_run
from cmae_scale.sizing.flops import count_flops

METRIC_NAMES = ("loss", "pixel", "contrast")


class Pretraining:
    """CMAE, or MAE, as the task of a run (see `loop.TrainTask`)."""

    metric_names = METRIC_NAMES  # `contrast` is before weight and scale: ln(keys) is chance for InfoNCE

    def __init__(
        self, state: TrainState, batch: BatchSizes, momentum: TargetMomentum, health: Health | None = None
    ) -> None:
        self.state, self.batch, self.momentum, self.health = state, batch, momentum, health
        self._cfg = state.run.cmae
        self._has_target = self._cfg.has_contrast
        self._first_row = state.context.world.rank * batch.local
        self._draws = DrawsAhead(self._cfg, total=batch.total)

    def take_step(
        self, crops: Sequence[CropBatch], *, step: int, update: Callable[[Tensor], bool]
    ) -> Float[Tensor, " metrics"]:
        """One optimizer step, by all ranks together; this rank's mean losses.

        `crops` are this rank's micro-batches. `update` gets the losses, moves the weights by the gradients
        that are there, and says whether it did: a step that is not finite moves nothing.
        """
        images = self._draw_views(crops, step=step)
        losses = accumulate_gradients(self.state.engine, images, health=self.health)
        if update(losses):
            with self.state.timer.span("ema"):
                self.state.ema.update_(self.momentum.at(step))  # the target follows the online branch
        return losses

    def _draw_views(self, crops: Sequence[CropBatch], *, step: int) -> StepImages:
        """This rank's images, with the random numbers of the whole global batch for their views and masks."""
        state = self.state
        with state.timer.span("augment"):
            draws = self._draws.take(step)
        return StepImages(
            crops,
            draws,
            first_row=self._first_row,
            cfg=self._cfg,
            has_target=self._has_target,
            device=state.context.device,
            timer=state.timer,
        )

    @property
    def image_flops(self) -> int:
        """Floating-point operations of one image's training step."""
        return count_flops(self._cfg).training

    def scheduled(self, step: int) -> dict[str, float]:
        """What changes from step to step, besides the learning rate."""
        return {"momentum": self.momentum.at(step)}

    def gather_encoder(self, *, is_kept: bool = True) -> dict[str, Tensor]:
        """The online encoder's weights in fp32 on the CPU; all ranks call it, also those that keep none."""
        return gather_weights(self.state.engine.module.online_encoder, is_kept=is_kept)

    def export(self, metrics: Mapping[str, Any]) -> Path:
        """Write the online encoder to RUN/encoder; all ranks call it together. See `export_run`."""
        run, is_first = self.state.run, self.state.context.world.is_first
        weights = self.gather_encoder(is_kept=is_first)
        if is_first:
            export_run(run, weights, metrics=metrics)
        return run.out / "encoder"


class Passed(NamedTuple):
    """What the pass of a micro-batch leaves behind, on the device and without gradient."""

    losses: Float[Tensor, " metrics"]
    query: Float[Tensor, "batch dim"] | None
    keys: Float[Tensor, "total dim"] | None


def accumulate_gradients(
    engine: Any, images: StepImages, *, health: Health | None = None
) -> Float[Tensor, " metrics"]:
    """This rank's mean losses of one optimizer step, after forward and backward of all micro-batches.

    They are METRIC_NAMES, on the device and without gradient; `contrast` is before weight and scale, so that
    ln(K) is chance for InfoNCE, and 0 for a plain MAE. InfoNCE compares with the keys of the whole global
    batch. With several micro-batches all their keys are computed first, which costs nothing extra: they carry
    no gradient. `engine` counts the micro-batches; the update after the last is the caller's `engine.step()`.
    """
    keys = None
    if images.has_target and len(images) > 1:
        with images.timer.span("target"):
            keys = compute_keys(engine, images)
    learn = partial(_learn, engine, keys=keys, cfg=images.cfg, timer=images.timer)
    passes: list[Passed] = []
    for passed in map(learn, images.views(online=True, target=keys is None)):
        passes.append(passed)
        if len(passes) < len(images):
            engine.step()
    if health is not None and health.is_due and passed.keys is not None:
        health.look_at_features(
            torch.cat([one.query for one in passes if one.query is not None]), passed.keys
        )
    return torch.stack([one.losses for one in passes]).mean(dim=0)


def _learn(
    engine: Any, micro: MicroBatch, *, keys: Tensor | None, cfg: CmaeConfig, timer: StepTimer
) -> Passed:
    """Forward and backward pass of one micro-batch; `keys` are of the global batch, if it has more."""
    assert micro.online is not None
    query = None
    with timer.span("forward"):
        output = engine(micro.online, micro.target, noise=micro.noise, target_noise=micro.target_noise)
        pixel = pixel_loss(
            output.pixels, _hidden_patches(micro.online, output.mask, cfg), norm_pix=cfg.loss.norm_pix
        )
        total, contrast = pixel, torch.zeros_like(pixel)
        if output.query is not None:
            query, keys = output.query.detach(), gather_rows(output.key) if keys is None else keys
            contrast = _contrast(output.query, keys, first_row=micro.first_row, loss=cfg.loss)
            total = pixel + contrast_factor(cfg.loss) * contrast
    with timer.span("backward"):
        engine.backward(total)
    return Passed(torch.stack([total.detach(), pixel.detach(), contrast.detach()]), query, keys)


@torch.no_grad()
def compute_keys(engine: Any, images: StepImages) -> Float[Tensor, "total dim"]:
    """Target projections of the global batch, in the order of the global batch."""

    def project(micro: MicroBatch) -> Tensor:
        key: Tensor = engine(None, micro.target, target_noise=micro.target_noise).key
        return key

    return gather_rows(torch.cat(list(map(project, images.views(online=False, target=True)))))


def _contrast(query: Tensor, keys: Tensor, *, first_row: int, loss: LossConfig) -> Tensor:
    if loss.contrast == "byol":
        return byol(query, keys[first_row : first_row + len(query)])
    return infonce(query, keys, first_row=first_row, temperature=loss.temperature)


def contrast_factor(loss: LossConfig) -> float:
    """What the contrast loss is multiplied by: weight times scale.

    Source: the official head multiplies InfoNCE by 2 * temperature (as MoCo v3), the paper by 1. BYOL's loss
    has no temperature.
    """
    scale = 2 * loss.temperature if loss.contrast == "infonce" and loss.scale == "official" else 1.0
    return loss.weight * scale


def _hidden_patches(
    online: Float[Tensor, "batch 3 side side"], mask: TokenMask, cfg: CmaeConfig
) -> Float[Tensor, "batch hidden values"]:
    return take_tokens(patchify(online, cfg.model.patch_size), mask.hidden)
