"""Images as sequences of patch vectors, and the patch embedding on such vectors."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
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
