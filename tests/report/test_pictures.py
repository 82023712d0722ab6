"""The sheet of reconstructions."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from cmae_scale.report import write_reconstructions
from cmae_scale.report.figures import hide_patches


def checkers(side: int) -> torch.Tensor:
    """A mask that hides every other pixel."""
    index = torch.arange(side)
    return ((index[:, None] + index) % 2).float()[None, None]


def test_hidden_places_turn_grey_and_the_others_stay(rng: torch.Generator) -> None:
    images, hidden = torch.rand(2, 3, 4, 4, generator=rng), checkers(4).expand(2, -1, -1, -1)
    shown = hide_patches(images, hidden)
    is_hidden = hidden.expand(-1, 3, -1, -1) == 1
    assert shown[is_hidden].unique().numel() == 1
    assert torch.equal(shown[~is_hidden], images[~is_hidden])


@pytest.mark.parametrize(("with_target", "columns"), [(True, 4), (False, 3)])
def test_the_sheet_shows_each_picture_in_its_place(tmp_path: Path, with_target: bool, columns: int) -> None:
    """Flat colours, one per column and row, are found again in the file from left to right, top to bottom."""
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).float()
    flat = colours[..., None, None].expand(-1, -1, 28, 28)
    path = tmp_path / "pictures" / "sheet.png"
    write_reconstructions(
        path,
        images=flat[0:2],
        hidden=torch.ones(2, 1, 28, 28),
        reconstructed=flat[2:4],
        target=flat[4:6] if with_target else None,
        note="a note",
    )
    pixels = np.asarray(Image.open(path).convert("RGB"))
    places = []
    for colour in flat[: 6 if with_target else 4, :, 0, 0]:
        rows, cols = np.nonzero((pixels == (255 * colour.numpy()).astype(np.uint8)).all(axis=2))
        assert len(rows) >= 200 * 200, "a tile is at least 200 px wide"
        places.append((round(float(cols.mean())), round(float(rows.mean()))))
    lefts = [place[0] for place in places]
    assert lefts[0::2] == lefts[1::2] == sorted(lefts[0::2])
    assert len({place[1] for place in places}) == 2
    assert all(upper[1] < lower[1] for upper, lower in zip(places[0::2], places[1::2], strict=True))
    assert pixels.shape[1] == round(100 * (columns * (2.24 + 0.08) - 0.08 + 0.6))


def test_drawing_leaves_no_figure_and_no_half_written_file_behind(tmp_path: Path) -> None:
    picture = torch.zeros(1, 3, 8, 8)
    write_reconstructions(tmp_path / "a.png", images=picture, hidden=picture[:, :1], reconstructed=picture)
    assert plt.get_fignums() == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_values_outside_of_the_range_are_clipped_and_gradients_do_no_harm(tmp_path: Path) -> None:
    wild = torch.full((1, 3, 8, 8), 7.0, requires_grad=True)
    write_reconstructions(tmp_path / "a.png", images=wild, hidden=wild[:, :1] * 0, reconstructed=-wild)
    assert Image.open(tmp_path / "a.png").size[0] > 0
