"""Forward and backward passes of one optimizer step: from its images, piece by piece, to gradients."""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig, LossConfig
from cmae_scale.core.collectives import gather_rows
from cmae_scale.engine.inputs import MicroBatch, StepImages
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.layers.masking import TokenMask, take_tokens
from cmae_scale.layers.patches import patchify
from cmae_scale.losses import byol, infonce, pixel_loss

METRIC_NAMES = ("loss", "pixel", "contrast")


def contrast_factor(loss: LossConfig) -> float:
    """What the contrast loss is multiplied by: weight times scale.

    Source: the official head multiplies InfoNCE by 2 * temperature (as MoCo v3), the paper by 1. BYOL's loss
    has no temperature.
    """
    scale = 2 * loss.temperature if loss.contrast == "infonce" and loss.scale == "official" else 1.0
    return loss.weight * scale


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
    if images.cfg.has_contrast and len(images) > 1:
        with images.timer.span("target"):
            keys = compute_keys(engine, images)
    learn = partial(_learn, engine, keys=keys, cfg=images.cfg, timer=images.timer)
    passes: list[Passed] = []
    for passed in map(learn, images.views(online=True, target=keys is None)):
        passes.append(passed)
        if len(passes) < len(images):
            engine.step()
    if health is not None and passed.keys is not None:
        health.look_at_features(
            torch.cat([one.query for one in passes if one.query is not None]), passed.keys
        )
    return torch.stack([one.losses for one in passes]).mean(dim=0)


@torch.no_grad()
def compute_keys(engine: Any, images: StepImages) -> Float[Tensor, "total dim"]:
    """Target projections of the global batch, in the order of the global batch."""

    def project(micro: MicroBatch) -> Tensor:
        key: Tensor = engine(None, micro.target, target_noise=micro.target_noise).key
        return key

    return gather_rows(torch.cat(list(map(project, images.views(online=False, target=True)))))


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
        if cfg.has_contrast:
            query, keys = output.query.detach(), gather_rows(output.key) if keys is None else keys
            contrast = _contrast(output.query, keys, first_row=micro.first_row, loss=cfg.loss)
            total = pixel + contrast_factor(cfg.loss) * contrast
    with timer.span("backward"):
        engine.backward(total)
    return Passed(torch.stack([total.detach(), pixel.detach(), contrast.detach()]), query, keys)


def _contrast(query: Tensor, keys: Tensor, *, first_row: int, loss: LossConfig) -> Tensor:
    if loss.contrast == "byol":
        return byol(query, keys[first_row : first_row + len(query)])
    return infonce(query, keys, first_row=first_row, temperature=loss.temperature)


def _hidden_patches(
    online: Float[Tensor, "batch 3 side side"], mask: TokenMask, cfg: CmaeConfig
) -> Float[Tensor, "batch hidden values"]:
    return take_tokens(patchify(online, cfg.model.patch_size), mask.hidden)
