import numpy as np
import pytest
import torch
from torch import Tensor

from cmae_scale.losses import patch_statistics, pixel_loss


def plain_pixel_loss(pixels: Tensor, patches: Tensor, *, norm_pix: bool) -> float:
    """Mean over images of the mean over hidden patches of the mean squared error, patch by patch."""
    per_image = []
    for image in range(len(pixels)):
        per_patch = []
        for patch in range(pixels.shape[1]):
            predicted, true = (values[image, patch].double().numpy() for values in (pixels, patches))
            if norm_pix:
                true = (true - true.mean()) / np.sqrt(true.var(ddof=1) + 1e-6)
            per_patch.append(np.square(predicted - true).mean())
        per_image.append(np.mean(per_patch))
    return float(np.mean(per_image))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_equals_the_loop_over_patches(rng: torch.Generator, norm_pix: bool) -> None:
    pixels, patches = torch.randn(2, 3, 5, 48, generator=rng) * 2 + 1
    loss = pixel_loss(pixels, patches, norm_pix=norm_pix)
    assert loss.item() == pytest.approx(plain_pixel_loss(pixels, patches, norm_pix=norm_pix), rel=1e-5)


def test_predicting_the_mean_of_every_patch_costs_its_variance(rng: torch.Generator) -> None:
    patches = torch.randn(4, 6, 768, generator=rng)
    loss = pixel_loss(torch.zeros_like(patches), patches)
    assert loss.item() == pytest.approx(767 / 768, rel=1e-4)  # unbiased variance, mean over all values


def test_a_flat_patch_has_a_finite_loss_and_gradient() -> None:
    pixels = torch.zeros(1, 2, 12, requires_grad=True)
    loss = pixel_loss(pixels, torch.full((1, 2, 12), 0.7))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert pixels.grad is not None
    assert pixels.grad.isfinite().all()


@pytest.mark.parametrize("parts", [2, 3])
def test_means_of_equal_parts_average_to_the_whole(rng: torch.Generator, parts: int) -> None:
    pixels, patches = torch.randn(2, 6, 5, 48, generator=rng)
    pieces = zip(pixels.chunk(parts), patches.chunk(parts), strict=True)
    mean = torch.stack([pixel_loss(*piece) for piece in pieces]).mean()
    torch.testing.assert_close(mean, pixel_loss(pixels, patches))


def test_low_precision_input_is_compared_in_full_precision(rng: torch.Generator) -> None:
    pixels, patches = torch.randn(2, 2, 5, 48, generator=rng).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = pixel_loss(pixels, patches)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pixel_loss(pixels.float(), patches.float()))


def test_statistics_bring_a_perfect_prediction_back_to_pixels(rng: torch.Generator) -> None:
    patches = torch.rand(2, 5, 48, generator=rng)
    mean, std = patch_statistics(patches)
    perfect = (patches - mean) / std
    assert pixel_loss(perfect, patches).item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(perfect * std + mean, patches)
