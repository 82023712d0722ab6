import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmae_scale.layers.tokens import PatchProjection, patchify, sincos_positions, unpatchify


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


def position(row: int, column: int, embed_dim: int) -> list[float]:
    """One patch's position by hand: sines and cosines of the row, then of the column."""
    quarter = embed_dim // 4
    angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (row, column)]
    return [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]


@pytest.mark.parametrize(("grid", "embed_dim"), [(14, 768), (16, 1280), (3, 8), (1, 4)])
def test_rows_come_first_then_columns(grid: int, embed_dim: int) -> None:
    expected = [position(row, column, embed_dim) for row in range(grid) for column in range(grid)]
    np.testing.assert_allclose(sincos_positions(grid, embed_dim, cls=False)[0], expected, atol=6e-8)


def test_mae_has_the_axes_the_other_way_round() -> None:
    ours = sincos_positions(5, 16, cls=False).view(5, 5, 2, 8)
    mae = ours.flip(2)  # columns first
    assert torch.equal(mae, ours.transpose(0, 1))
    assert not torch.equal(mae, ours)


def test_the_class_token_has_position_zero_before_all_patches() -> None:
    with_cls = sincos_positions(4, 8, cls=True)
    assert with_cls.shape == (1, 17, 8)
    assert with_cls.dtype == torch.float32
    assert not with_cls[0, 0].any()
    assert torch.equal(with_cls[:, 1:], sincos_positions(4, 8, cls=False))
