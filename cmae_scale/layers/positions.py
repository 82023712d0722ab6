"""Fixed sine-cosine positions of a square grid of patches."""

import torch
from jaxtyping import Float
from torch import Tensor


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
