"""Forward and backward passes of one optimizer step: from the views of its micro-batches to gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.collectives import gather_rows
from cmae_scale.core.settings import CmaeConfig, LossConfig
from cmae_scale.engine.watch.health import Health
from cmae_scale.engine.watch.spans import Spans
from cmae_scale.layers.masking import take_tokens
from cmae_scale.layers.patches import patchify
from cmae_scale.losses import byol, infonce, pixel_loss

METRIC_NAMES = ("loss", "pixel", "contrast")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of this rank sees. Noise fixes the masks: see `CMAE.forward`."""

    online: Float[Tensor, "batch 3 side side"]
    target: Float[Tensor, "batch 3 side side"]
    noise: Float[Tensor, "batch cells"]
    target_noise: Float[Tensor, "batch cells"]


def contrast_factor(loss: LossConfig) -> float:
    """What the contrast loss is multiplied by: weight times scale.

    Source: the official head multiplies InfoNCE by 2 * temperature (as MoCo v3), the paper by 1. BYOL's loss
    has no temperature.
    """
    scale = 2 * loss.temperature if loss.contrast == "infonce" and loss.scale == "official" else 1.0
    return loss.weight * scale


def accumulate_gradients(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    *,
    cfg: CmaeConfig,
    rank: int,
    spans: Spans,
    health: Health | None = None,
) -> Float[Tensor, " metrics"]:
    """This rank's mean losses of one optimizer step, after forward and backward of all micro-batches.

    They are METRIC_NAMES, on the device and without gradient; `contrast` is before weight and scale, so that
    ln(K) is chance for InfoNCE, and 0 for a plain MAE. InfoNCE compares with the keys of the whole global
    batch. With several micro-batches all their keys are computed first, which costs nothing extra: they carry
    no gradient. `engine` counts the micro-batches; the update after the last is the caller's `engine.step()`.
    """
    keys = None
    if cfg.has_contrast and len(micro_batches) > 1:
        with spans.span("target"):
            keys = compute_keys(engine, micro_batches)
    local = sum(len(micro.online) for micro in micro_batches)
    first_row = rank * local
    losses, queries = [], []
    for micro in micro_batches:
        with spans.span("forward"):
            output = engine(
                micro.online,
                micro.target if cfg.has_contrast and keys is None else None,
                noise=micro.noise,
                target_noise=micro.target_noise,
            )
            pixel = pixel_loss(
                output.pixels, _hidden_patches(micro, output.mask, cfg), norm_pix=cfg.loss.norm_pix
            )
            total, contrast = pixel, torch.zeros_like(pixel)
            if cfg.has_contrast:
                keys = gather_rows(output.key) if keys is None else keys
                contrast = _contrast(output.query, keys, first_row=first_row, loss=cfg.loss)
                total = pixel + contrast_factor(cfg.loss) * contrast
                queries.append(output.query.detach())
        first_row += len(micro.online)
        with spans.span("backward"):
            engine.backward(total)
            if micro is not micro_batches[-1]:
                engine.step()
        losses.append(torch.stack([total.detach(), pixel.detach(), contrast.detach()]))
    if health is not None and keys is not None:
        health.look_at_features(torch.cat(queries), keys)
    return torch.stack(losses).mean(dim=0)


@torch.no_grad()
def compute_keys(engine: Any, micro_batches: Sequence[MicroBatch]) -> Float[Tensor, "total dim"]:
    """Target projections of the global batch, in the order of the global batch."""
    keys = [engine(None, micro.target, target_noise=micro.target_noise).key for micro in micro_batches]
    return gather_rows(torch.cat(keys))


def _contrast(query: Tensor, keys: Tensor, *, first_row: int, loss: LossConfig) -> Tensor:
    if loss.contrast == "byol":
        return byol(query, keys[first_row : first_row + len(query)])
    return infonce(query, keys, first_row=first_row, temperature=loss.temperature)


def _hidden_patches(micro: MicroBatch, mask: Any, cfg: CmaeConfig) -> Float[Tensor, "batch hidden values"]:
    return take_tokens(patchify(micro.online, cfg.model.patch_size), mask.hidden)
