"""Positions of one patch grid for another."""

from math import isqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cmae_scale.layers.patches import sincos_positions

_SAME = 4e-3  # what rounding to bf16 makes of numbers up to 1


class Refitted(NamedTuple):
    """Positions of another grid, and whether they follow from a formula (else they were interpolated)."""

    positions: Float[Tensor, "1 tokens embed"]
    is_computed: bool


def refit_positions(positions: Float[Tensor, "1 places embed"], *, grid: int) -> Refitted:
    """`positions` of a square grid, with or without one for the class token, for grid x grid patches.

    Fixed sines and cosines, ours or MAE's (whose columns come before the rows), are those of the new grid.
    Others were learned: they are interpolated. Source: MAE util/pos_embed.py, timm (bicubic).
    """
    side, embed_dim = isqrt(positions.shape[1]), positions.shape[2]
    has_cls = positions.shape[1] > side**2
    known, new = (sincos_positions(patches, embed_dim, cls=has_cls) for patches in (side, grid))
    for order in (known, known.roll(embed_dim // 2, dims=2)):
        if torch.allclose(positions.float(), order, rtol=0, atol=_SAME):
            shift = 0 if order is known else embed_dim // 2
            return Refitted(new.roll(shift, dims=2), is_computed=True)
    resized = resample_abs_pos_embed(positions.float(), new_size=[grid, grid], num_prefix_tokens=int(has_cls))
    return Refitted(resized, is_computed=False)
