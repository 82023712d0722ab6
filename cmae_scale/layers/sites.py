"""Feature maps finer than the patches, held for the kept patches alone.

A map's places are called sites here: `side` x `side` of them make up a patch. In a sequence of sites the
patches follow one another in the mask's order; within a patch, each 2 x 2 neighbours stand together, and so
do 2 x 2 of those. Merging neighbours for the next, coarser map is then a mere view.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


def number_sites(grid: int, side: int, *, device: torch.device) -> Int[Tensor, "patches sites"]:
    """Row-major numbers, in a map of grid * side sites along a side, of the sites of each patch.

    `side` is a power of two.
    """
    levels = side.bit_length() - 1
    split = (grid, *[2] * levels)
    numbers = torch.arange((grid * side) ** 2, device=device).view(*split, *split)
    order = [axis for level in range(levels + 1) for axis in (level, levels + 1 + level)]
    return numbers.permute(order).reshape(grid * grid, side * side)


class KeptSites(NamedTuple):
    """Where the sites of the kept patches are in the maps of a batch."""

    rows: Int[Tensor, "taken"]  # of the batch's maps laid out site after site, image after image
    batch: int
    map_side: int  # sites along a side of the map

    def take(self, sites: Float[Tensor, "batch all dim"]) -> Float[Tensor, "batch kept dim"]:
        """The kept ones of sites in row-major order."""
        return sites.flatten(0, 1).index_select(0, self.rows).view(self.batch, -1, sites.shape[2])

    def spread(self, sites: Float[Tensor, "batch kept dim"]) -> Float[Tensor, "batch dim side side"]:
        """A map, channels last in memory, with zeros where nothing is kept."""
        blank = sites.new_zeros(self.batch * self.map_side**2, sites.shape[2])
        rows = blank.index_copy(0, self.rows, sites.flatten(0, 1))
        return rows.view(self.batch, self.map_side, self.map_side, -1).permute(0, 3, 1, 2)

    def collect(self, maps: Float[Tensor, "batch dim side side"]) -> Float[Tensor, "batch kept dim"]:
        """The kept sites of a map."""
        return self.take(maps.permute(0, 2, 3, 1).flatten(1, 2))


def place_sites(kept: Int[Tensor, "batch patches"], *, grid: int, side: int) -> KeptSites:
    """The sites of the patches `kept` in maps of `side` x `side` sites a patch."""
    numbers = number_sites(grid, side, device=kept.device)[kept].flatten(1)
    first = torch.arange(kept.shape[0], device=kept.device)[:, None] * (grid * side) ** 2
    return KeptSites((numbers + first).flatten(), kept.shape[0], grid * side)


class SiteProjection(nn.Conv2d):
    """A convolution whose kernel is as large as its stride, on sites: one matrix product.

    `side` 1 is a pointwise convolution; a larger one merges side x side neighbours into one site. It has
    Conv2d's parameters, so that a state_dict is that of the published code.
    """

    def __init__(self, dim_in: int, dim_out: int, *, side: int = 1) -> None:
        super().__init__(dim_in, dim_out, kernel_size=side, stride=side)
        self.side = side

    def forward(self, sites: Float[Tensor, "batch sites dim_in"]) -> Float[Tensor, "batch merged dim_out"]:
        """Sites in this module's order in, one for each side x side of them out."""
        weight = self.weight.flatten(2)
        if self.side > 1:
            weight = weight[:, :, number_sites(1, self.side, device=weight.device)[0]]
        merged = sites.reshape(sites.shape[0], -1, self.side**2 * sites.shape[2])
        return F.linear(merged, weight.transpose(1, 2).flatten(1), self.bias)
