import pytest
import torch
from torch import Tensor, nn

from cmae_scale.layers.patches import PatchProjection, patchify, unpatchify


def cut(images: Tensor, patch: int) -> Tensor:
    """Patch vectors written out pixel by pixel."""
    batch, channels, side, _ = images.shape
    grid = side // patch
    patches = torch.empty(batch, grid * grid, patch * patch * channels)
    for number in range(grid * grid):
        top, left = (number // grid) * patch, (number % grid) * patch
        for row in range(patch):
            for column in range(patch):
                start = (row * patch + column) * channels
                patches[:, number, start : start + channels] = images[:, :, top + row, left + column]
    return patches


@pytest.mark.parametrize(("side", "patch"), [(8, 4), (9, 3), (4, 1), (6, 6)])
def test_patches_are_in_row_column_channel_order(rng: torch.Generator, side: int, patch: int) -> None:
    images = torch.randn(2, 3, side, side, generator=rng)
    assert torch.equal(patchify(images, patch), cut(images, patch))


@pytest.mark.parametrize(("side", "patch"), [(8, 4), (9, 3), (4, 1), (6, 6)])
def test_patches_go_back_together(rng: torch.Generator, side: int, patch: int) -> None:
    images = torch.randn(2, 3, side, side, generator=rng)
    assert torch.equal(unpatchify(patchify(images, patch), patch), images)


def test_the_projection_is_the_convolution_in_value_and_gradient(rng: torch.Generator) -> None:
    projection = PatchProjection(4, 10)
    convolution = nn.Conv2d(3, 10, kernel_size=4, stride=4)
    convolution.load_state_dict(projection.state_dict())
    images, ahead = torch.randn(2, 3, 12, 12, generator=rng), torch.randn(2, 9, 10, generator=rng)
    embedded = projection(patchify(images, 4))
    expected = convolution(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedded, expected)
    embedded.backward(ahead)
    expected.backward(ahead)
    for (name, ours), theirs in zip(projection.named_parameters(), convolution.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
