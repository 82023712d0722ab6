"""The reconstruction loss."""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of the values of each patch; `std` is what the loss divides by."""

    mean: Float[Tensor, "batch patches 1"]
    std: Float[Tensor, "batch patches 1"]


def patch_statistics(patches: Float[Tensor, "batch patches values"]) -> PatchStatistics:
    """Statistics that normalise patches for the loss, and bring a prediction back to pixels: p * std + mean.

    Source: facebookresearch/mae models_mae.py: unbiased variance, 1e-6 inside the root.
    """
    patches = patches.float()
    return PatchStatistics(
        mean=patches.mean(dim=-1, keepdim=True), std=(patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    )


def pixel_loss(
    pixels: Float[Tensor, "batch hidden values"],
    patches: Float[Tensor, "batch hidden values"],
    *,
    norm_pix: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared error of the predicted hidden patches against the true ones, normalised patch by patch.

    In fp32 whatever comes in. Every image hides equally many patches, so the mean over everything is the
    mean over images, and means of equal parts of a batch average to the whole.

    Source: paper equation 5. Differs: also the mean, not the sum, over the values of a patch, as the official
    code and MAE have it.
    """
    patches = patches.float()
    if norm_pix:
        mean, std = patch_statistics(patches)
        patches = (patches - mean) / std
    return F.mse_loss(pixels.float(), patches)
