"""From bytes to what a network sees, without anything random."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@torch.no_grad()
def normalise(
    images: UInt8[Tensor, "batch 3 side side"], *, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "batch 3 side side"]:
    """Images with `mean` (of RGB in [0, 1]) taken away and divided by `std`, on their own device."""
    centre, spread = torch.tensor([list(mean), list(std)]).to(images.device, non_blocking=True)[
        ..., None, None
    ]
    return images.float().sub_(centre * 255).div_(spread * 255)
