"""What the model makes of held-out images, for the eye."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cmae_scale.augment import denormalise
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.engine.inputs import draw_step
from cmae_scale.layers.masking import take_tokens
from cmae_scale.layers.patches import patchify, unpatchify
from cmae_scale.losses import patch_statistics


@dataclass(frozen=True)
class Preview:
    """Pictures in [0, 1] on the CPU, one row per image. `hidden` is 1 where the encoder saw nothing."""

    images: Float[Tensor, "batch 3 side side"]
    hidden: Float[Tensor, "batch 1 side side"]
    reconstructed: Float[Tensor, "batch 3 side side"]
    target: Float[Tensor, "batch 3 side side"] | None  # a plain MAE has no target view


@torch.no_grad()
def preview(engine: Any, masters: UInt8[Tensor, "batch 3 master master"], *, cfg: CmaeConfig) -> Preview:
    """Reconstructions of `masters`; every rank must call it with the same images.

    A model trained on normalised patches predicts their structure only: mean and deviation are the true ones,
    and visible patches are shown as they are. Source: MAE's visualisation.
    """
    crops = 2 if cfg.views.target_crop == "random" else 1
    images = masters[:, None].expand(-1, crops, -1, -1, -1)
    draws = draw_step(cfg, total=len(images), step=0)
    micro = draws.prepare(images, first_row=0, cfg=cfg, target=cfg.has_contrast)
    assert micro.online is not None
    engine.eval()
    output = engine(micro.online, None, noise=micro.noise)
    engine.train()
    patch = cfg.model.patch_size
    patches = patchify(micro.online, patch)
    true = take_tokens(patches, output.mask.hidden)
    predicted = output.pixels.float()
    if cfg.loss.norm_pix:
        mean, std = patch_statistics(true)
        predicted = predicted * std + mean
    everywhere = patches.scatter(1, output.mask.hidden[:, :, None].expand_as(predicted), predicted)
    blank = torch.zeros_like(patches).scatter(1, output.mask.hidden[:, :, None].expand_as(true), 1.0)
    return Preview(
        images=denormalise(micro.online, views=cfg.views).cpu(),
        hidden=unpatchify(blank, patch)[:, :1].cpu(),
        reconstructed=denormalise(unpatchify(everywhere, patch), views=cfg.views).cpu(),
        target=None if micro.target is None else denormalise(micro.target, views=cfg.views).cpu(),
    )
