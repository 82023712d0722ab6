"""Random erasing: a rectangle of normal noise over an image, from the row's own numbers."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_TRIES = 10  # Source: timm RandomErasing
_ASPECT = math.log(0.3)  # of height / width, log-uniform in 0.3 .. 1 / 0.3. Source: timm


@dataclass(frozen=True)
class ErasedBoxes:
    """Rows of the global batch that lose a box: [top, left, height, width] px, and the seed of its noise."""

    row: Int64[Tensor, " some"]
    box: Int64[Tensor, "some 4"]
    seed: Int64[Tensor, " some"]


def draw_boxes(
    total: int, *, p: float, area: tuple[float, float], img_px: int, rng: torch.Generator
) -> ErasedBoxes:
    """Which of `total` images are erased with probability `p`, and where, from a CPU generator.

    Ten tries for a box that fits, as timm. Source: Zhong et al. (arXiv:1708.04896); timm RandomErasing.
    """
    uniform = torch.rand(total, 3 + 2 * _TRIES, generator=rng, dtype=torch.float64)
    seed = torch.randint(2**62, (total,), generator=rng)
    chance, high, wide, tries = uniform[:, 0], uniform[:, 1], uniform[:, 2], uniform[:, 3:].view(total, -1, 2)
    size = (area[0] + (area[1] - area[0]) * tries[..., 0]) * img_px**2
    shape = torch.exp(_ASPECT * (1 - 2 * tries[..., 1]))
    height, width = (size * shape).sqrt().round().long(), (size / shape).sqrt().round().long()
    fits = (height < img_px) & (width < img_px)
    first = fits.int().argmax(1, keepdim=True)
    height, width = height.gather(1, first)[:, 0], width.gather(1, first)[:, 0]
    row = ((chance < p) & fits.any(1)).nonzero()[:, 0]
    top, left = (high * (img_px - height + 1)).long(), (wide * (img_px - width + 1)).long()
    return ErasedBoxes(row, torch.stack([top, left, height, width], dim=1)[row], seed[row])


def erase_(images: Float[Tensor, "batch 3 side side"], boxes: ErasedBoxes, *, first_row: int) -> None:
    """Erase, in place, those of `images` (normalised; they begin at `first_row`) that `boxes` names.

    Noise of mean 0 and deviation 1 for every value: timm's "pixel" mode after normalisation, as MAE.
    """
    for row, (top, left, height, width), seed in zip(
        boxes.row.tolist(), boxes.box.tolist(), boxes.seed.tolist(), strict=True
    ):
        if first_row <= row < first_row + len(images):
            noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))
            part = images[row - first_row, :, top : top + height, left : left + width]
            part.copy_(noise, non_blocking=True)
