"""Every colour operation against torchvision's, one image at a time with the same numbers.

Values are in [0, 1], so an absolute difference of 2e-6 is 16 steps of float32 at 1: a few roundings per
operation in another order. Hue is the worst: torchvision adds whole turns before it takes the remainder.
"""

import pytest
import torch
import torchvision.transforms.functional as tv
import torchvision.transforms.v2.functional as tv2
from torch import Tensor

from cmae_scale.augment.color import (
    blur_radius,
    gaussian_blur,
    grayscale,
    jitter_,
    number_hue,
    number_jitter,
    turn_hue_,
    weigh_taps,
)

TOLERANCE = 2e-6
SIDES = [(7, 7), (28, 28), (33, 21)]


def assert_close(got: Tensor, wanted: Tensor, *, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    """Random colours, a grey image, black, white, flat primaries, and bytes (with many equal channels)."""
    noise = torch.rand(4, 3, 28, 28, generator=rng)
    gray = torch.rand(1, 1, 28, 28, generator=rng).expand(1, 3, 28, 28)
    flat = torch.tensor(
        [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0.0]]
    )
    few = torch.randint(0, 3, (3, 3, 28, 28), generator=rng) / 2
    return torch.cat([noise, gray, flat[..., None, None].expand(-1, -1, 28, 28), few]).contiguous()


def jitter_slowly(image: Tensor, *, order: Tensor, factors: Tensor) -> Tensor:
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for operation in order.tolist():
        image = operations[operation](image, float(factors[operation]))
    return image


def one_operation(images: Tensor, operation: int, factors: Tensor) -> Tensor:
    """Only `operation` with these factors, through jitter_ with the three others switched off."""
    result = images.clone()
    every = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(len(images), 1)
    every[:, operation] = factors
    jitter_(result, number_jitter(order=torch.arange(4).repeat(len(images), 1), factors=every))
    return result


@pytest.mark.parametrize(("high", "wide"), SIDES)
def test_grayscale_equals_torchvision(rng: torch.Generator, high: int, wide: int) -> None:
    images = torch.rand(3, 3, high, wide, generator=rng)
    assert_close(grayscale(images), torch.stack([tv.rgb_to_grayscale(image) for image in images]))


@pytest.mark.parametrize("functional", [tv, tv2])
@pytest.mark.parametrize(("operation", "name"), [(0, "brightness"), (1, "contrast"), (2, "saturation")])
def test_each_blend_equals_torchvision(images: Tensor, functional: object, operation: int, name: str) -> None:
    factors = torch.linspace(0, 2, len(images))
    adjust = getattr(functional, f"adjust_{name}")
    wanted = torch.stack(
        [adjust(image, float(factor)) for image, factor in zip(images, factors, strict=True)]
    )
    assert_close(one_operation(images, operation, factors), wanted)


@pytest.mark.parametrize("functional", [tv, tv2])
@pytest.mark.parametrize("turns", [-0.5, -0.1, -1e-3, 1e-3, 0.1, 1 / 3, 0.5])
def test_hue_equals_torchvision_also_where_channels_are_equal(
    images: Tensor, functional: object, turns: float
) -> None:
    result = images.clone()
    turn_hue_(result, number_hue(torch.full((len(images),), turns)))
    wanted = torch.stack([functional.adjust_hue(image, turns) for image in images])  # type: ignore[attr-defined]
    assert_close(result, wanted)


def test_each_image_gets_its_own_hue(images: Tensor, rng: torch.Generator) -> None:
    turns = torch.rand(len(images), generator=rng) - 0.5
    result = images.clone()
    turn_hue_(result, number_hue(turns))
    wanted = [tv.adjust_hue(image, float(turn)) for image, turn in zip(images, turns, strict=True)]
    assert_close(result, torch.stack(wanted))


def test_hue_is_exact_where_colours_are_nearly_grey(rng: torch.Generator) -> None:
    images = 0.5 + 1e-4 * torch.rand(2, 3, 16, 16, generator=rng)
    result = images.clone()
    turn_hue_(result, number_hue(torch.tensor([0.07, -0.3])))
    assert_close(result, torch.stack([tv.adjust_hue(images[0], 0.07), tv.adjust_hue(images[1], -0.3)]))


def test_jitter_equals_torchvision_in_every_order(rng: torch.Generator) -> None:
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[torch.tensor([len(set(row)) == 4 for row in order.tolist()])]
    order = order[(order == 3).int().argmax(1).argsort(stable=True)]
    images = torch.rand(24, 3, 16, 16, generator=rng)
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    factors = low + (high - low) * torch.rand(24, 4, generator=rng)
    wanted = [
        jitter_slowly(image, order=o, factors=f) for image, o, f in zip(images, order, factors, strict=True)
    ]
    jitter_(images, number_jitter(order=order, factors=factors))
    assert_close(
        images, torch.stack(wanted), tolerance=5e-6
    )  # four operations, contrast adds a mean's rounding


def test_jitter_refuses_images_that_are_not_sorted_by_the_place_of_hue() -> None:
    order = torch.tensor([[0, 1, 2, 3], [3, 0, 1, 2]])
    with pytest.raises(AssertionError, match="sorted"):
        number_jitter(order=order, factors=torch.ones(2, 4))


@pytest.mark.parametrize(("high", "wide"), SIDES)
def test_blur_equals_torchvision_with_the_same_kernel_size(
    rng: torch.Generator, high: int, wide: int
) -> None:
    images = torch.rand(4, 3, high, wide, generator=rng)
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    radius = blur_radius(2.0, min(high, wide))
    wanted = [
        tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(s)] * 2)
        for image, s in zip(images, sigma, strict=True)
    ]
    assert_close(gaussian_blur(images, weigh_taps(sigma, radius=radius)), torch.stack(wanted))


def test_blur_is_nearly_the_untruncated_gaussian(rng: torch.Generator) -> None:
    images = torch.rand(1, 3, 64, 64, generator=rng)
    wide = tv.gaussian_blur(images[0], [41, 41], [2.0, 2.0])
    narrow = gaussian_blur(images, weigh_taps(torch.tensor([2.0]), radius=blur_radius(2.0, 64)))[0]
    assert (narrow - wide).abs().max() < 1 / 255  # less than one step of a byte


def test_blur_keeps_a_flat_image(rng: torch.Generator) -> None:
    flat = torch.rand(2, 3, 1, 1, generator=rng).expand(-1, -1, 20, 20).contiguous()
    assert_close(gaussian_blur(flat, weigh_taps(torch.tensor([0.1, 2.0]), radius=6)), flat)


@pytest.mark.parametrize(("side", "radius"), [(224, 6), (28, 6), (7, 6), (6, 5), (2, 1), (1, 0)])
def test_the_blur_reaches_three_sigma_or_what_mirroring_allows(side: int, radius: int) -> None:
    assert blur_radius(2.0, side) == radius
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    assert gaussian_blur(image, weigh_taps(torch.tensor([2.0]), radius=radius)).isfinite().all()
