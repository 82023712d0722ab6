import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmae_scale.layers.tokens import patchify
from cmae_scale.models.hybrid import SiteProjection, number_sites, place_sites

GRID = 3


def test_within_a_patch_neighbours_stand_together() -> None:
    """Of 2 x 2 patches of 4 x 4 sites: the first patch, 2 x 2 neighbours at a time."""
    numbers = number_sites(2, 4, device=torch.device("cpu"))
    assert numbers[0].tolist() == [0, 1, 8, 9, 2, 3, 10, 11, 16, 17, 24, 25, 18, 19, 26, 27]
    assert numbers[3].tolist() == [36 + number for number in numbers[0].tolist()]


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_every_site_belongs_to_its_patch_once(side: int) -> None:
    numbers = number_sites(GRID, side, device=torch.device("cpu"))
    assert sorted(numbers.flatten().tolist()) == list(range((GRID * side) ** 2))
    rows, columns = numbers // (GRID * side) // side, numbers % (GRID * side) // side
    assert torch.equal(rows * GRID + columns, torch.arange(GRID**2)[:, None].expand_as(numbers))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_spread_puts_kept_sites_in_their_places_and_zeros_elsewhere(rng: torch.Generator, side: int) -> None:
    maps = torch.randn(2, 5, GRID * side, GRID * side, generator=rng)
    kept = torch.tensor([[0, 4, 7], [8, 1, 3]])
    places = place_sites(kept, grid=GRID, side=side)
    sites = places.collect(maps)
    assert sites.shape == (2, 3 * side**2, 5)
    seen = torch.zeros(2, GRID**2).scatter(1, kept, 1.0).view(2, 1, GRID, GRID)
    seen = seen.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
    assert torch.equal(places.spread(sites), maps * seen)
    rows = maps.permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(places.take(rows), sites)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_a_projection_of_sites_is_the_convolution(rng: torch.Generator, side: int) -> None:
    """Against torch's convolution on the whole map, for sites of a finer map four times a patch's side."""
    projection, convolution = SiteProjection(5, 7, side=side), nn.Conv2d(5, 7, side, stride=side)
    convolution.load_state_dict(projection.state_dict())
    maps = torch.randn(2, 5, GRID * 4, GRID * 4, generator=rng)
    kept = torch.tensor([[0, 5, 7], [8, 1, 3]])
    ours = projection(place_sites(kept, grid=GRID, side=4).collect(maps))
    merged = place_sites(kept, grid=GRID, side=4 // side)
    torch.testing.assert_close(ours, merged.collect(convolution(maps)))


def test_gradients_are_those_of_the_whole_map(rng: torch.Generator) -> None:
    kept = torch.tensor([[2, 4], [0, 8]])
    places = place_sites(kept, grid=GRID, side=2)
    sites = torch.randn(2, 8, 6, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, 3, 3, generator=rng, dtype=torch.float64)

    def look_around(sites: torch.Tensor) -> torch.Tensor:
        return places.collect(F.conv2d(places.spread(sites), weight, padding=1, groups=6))

    assert torch.autograd.gradcheck(look_around, sites)


def test_image_tiles_are_sites_too(rng: torch.Generator) -> None:
    images = torch.randn(1, 3, GRID * 8, GRID * 8, generator=rng)
    tiles = place_sites(torch.tensor([[4]]), grid=GRID, side=4).take(patchify(images, 2))
    patch = images[:, :, 8:16, 8:16]
    assert torch.equal(tiles[0, 0], patch[0, :, :2, :2].permute(1, 2, 0).flatten())
    assert torch.equal(tiles[0, 2], patch[0, :, 2:4, :2].permute(1, 2, 0).flatten())
