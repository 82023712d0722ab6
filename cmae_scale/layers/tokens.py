"""From images to tokens and back: patches, their positions, and the masks that hide some of them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn


def patchify(
    images: Shaped[Tensor, "batch channels side side"], patch: int
) -> Shaped[Tensor, "batch patches values"]:
    """Patches row by row, each a vector in (row, column, channel) order.

    Source: MAE models_mae.py; the order fixes which output of the pixel decoder means which pixel.
    """
    batch, channels, side, _ = images.shape
    grid = side // patch
    tiles = images.reshape(batch, channels, grid, patch, grid, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, patch * patch * channels)


def unpatchify(
    patches: Shaped[Tensor, "batch patches values"], patch: int
) -> Shaped[Tensor, "batch channels side side"]:
    """The images that `patchify` cut; the number of patches is a square."""
    batch, count, values = patches.shape
    grid = round(count**0.5)
    tiles = patches.reshape(batch, grid, grid, patch, patch, values // patch**2)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, grid * patch, grid * patch)


class PatchProjection(nn.Conv2d):
    """A patch convolution's weights applied to patch vectors: one matrix product for the patches at hand.

    It has Conv2d's parameters so that a state_dict is timm's, and costs nothing for patches that are hidden.
    """

    def __init__(self, patch: int, embed_dim: int, *, channels: int = 3) -> None:
        super().__init__(channels, embed_dim, kernel_size=patch, stride=patch)

    def forward(self, patches: Float[Tensor, "batch tokens values"]) -> Float[Tensor, "batch tokens embed"]:
        """Embedding of each patch vector, given in `patchify`'s order."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.bias)


class PatchEmbed(nn.Module):
    """The place that `PatchProjection` has in a timm VisionTransformer: `patch_embed.proj`."""

    def __init__(self, patch: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(patch, embed_dim)

    def forward(self, patches: Float[Tensor, "batch tokens values"]) -> Float[Tensor, "batch tokens embed"]:
        """Embedding of each patch vector, given in `patchify`'s order."""
        embedded: Tensor = self.proj(patches)
        return embedded


def sincos_positions(grid: int, embed_dim: int, *, cls: bool) -> Float[Tensor, "1 tokens {embed_dim}"]:
    """Positions of grid x grid patches in row-major order, after a row of zeros for the class token if `cls`.

    The first half of the channels tells the row, the second half the column; in each half the sines come
    first. Wavelengths run geometrically from 2 pi to 10000 * 2 pi. Computed in fp64, returned in fp32.

    Source: official CMAE position embedding. MAE has the two halves the other way round, so weights of one
    are of no use with positions of the other: an import takes the stored positions.
    """
    quarter, cpu = embed_dim // 4, torch.device("cpu")  # also for a model that is laid out on meta
    frequency = 10000 ** -(torch.arange(quarter, dtype=torch.float64, device=cpu) / quarter)
    angle = torch.arange(grid, dtype=torch.float64, device=cpu)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(grid, grid, -1)
    columns = axis[None].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=2).reshape(grid * grid, embed_dim)
    before = torch.zeros(int(cls), embed_dim, dtype=torch.float64, device=cpu)
    return torch.cat([before, patches]).float()[None]


class TokenMask(NamedTuple):
    """Patch numbers, row-major and ascending; together they are every patch of the image exactly once."""

    kept: Int[Tensor, "batch kept"]
    hidden: Int[Tensor, "batch hidden"]


def mask_from_noise(noise: Float[Tensor, "batch cells"], *, grid: int, cell: int, ratio: float) -> TokenMask:
    """Mask that keeps the `int(cells * (1 - ratio))` cells with the lowest noise.

    A cell is `cell` x `cell` patches; `grid`, the patches along a side, is a multiple of it. Of equal noise
    the earlier cell counts as lower.

    Source: official cmae_vit.py: of 7 x 7 cells at ratio 0.65 17 stay, 68 of 196 patches. MAE has cell 1.
    """
    patches = patches_of_cells(grid, cell, device=noise.device)
    order = noise.argsort(dim=1, stable=True)
    num_kept = int(len(patches) * (1 - ratio))
    kept = patches[order[:, :num_kept]].flatten(1)
    hidden = patches[order[:, num_kept:]].flatten(1)
    return TokenMask(kept.sort(dim=1).values, hidden.sort(dim=1).values)


def patches_of_cells(grid: int, cell: int, *, device: torch.device) -> Int[Tensor, "cells members"]:
    """Numbers of the patches of each cell; cells and patches are both counted row by row."""
    side = grid // cell
    numbers = torch.arange(grid * grid, device=device).view(side, cell, side, cell)
    return numbers.transpose(1, 2).reshape(side * side, cell * cell)


def take_tokens(
    tokens: Shaped[Tensor, "batch tokens dim"], index: Int[Tensor, "batch taken"]
) -> Shaped[Tensor, "batch taken dim"]:
    """The tokens at `index`, in that order."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def pack_tokens(
    visible: Float[Tensor, "batch visible dim"], blanks: Float[Tensor, "tokens dim"]
) -> Float[Tensor, "rows dim"]:
    """Rows for layers that treat each token alone: all images' own tokens, then those that they share."""
    return torch.cat([visible.flatten(0, 1), blanks])


def unpack_tokens(
    rows: Float[Tensor, "rows dim"], places: Int[Tensor, "batch visible"]
) -> Float[Tensor, "batch tokens dim"]:
    """The whole sequence of each image: its own tokens at its `places`, shared ones everywhere else."""
    batch, visible = places.shape
    own, blanks = rows[: batch * visible], rows[batch * visible :]
    index = places[:, :, None].expand(-1, -1, rows.shape[1])
    return blanks.expand(batch, -1, -1).scatter(1, index, own.view(batch, visible, -1))


def scatter_tokens(
    tokens: Float[Tensor, "batch kept dim"], mask: TokenMask, *, fill: Float[Tensor, "1 1 dim"]
) -> Float[Tensor, "batch patches dim"]:
    """Every patch in its place: `tokens` where kept, `fill` where hidden. Has the dtype of `fill`."""
    batch, kept, dim = tokens.shape
    everywhere = fill.expand(batch, kept + mask.hidden.shape[1], dim)
    return everywhere.scatter(1, mask.kept[:, :, None].expand(-1, -1, dim), tokens.to(fill.dtype))
