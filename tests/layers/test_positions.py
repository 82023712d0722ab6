import math

import numpy as np
import pytest
import torch

from cmae_scale.layers.positions import sincos_positions


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
