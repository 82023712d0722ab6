"""The sheet of reconstructions: what the model saw and what it made of it."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.report.canvas import FAINT, INK, draw_figure

_GRAY = 0.55  # of the hidden patches: unlike black and white, rare as a flat patch of a photograph

# inches
_TILE, _GAP, _MARGIN, _HEAD, _FOOT = 2.24, 0.08, 0.3, 1.25, 0.4


def write_reconstructions(
    path: str | Path,
    *,
    images: Float[Tensor, "batch 3 side side"],
    hidden: Float[Tensor, "batch 1 side side"],
    reconstructed: Float[Tensor, "batch 3 side side"],
    target: Float[Tensor, "batch 3 side side"] | None = None,
    title: str = "Reconstructions",
    note: str = "",
) -> None:
    """A PNG with one row per image: online view, what the encoder sees of it, reconstruction, target view.

    All pictures are RGB in [0, 1]; `hidden` is 1 where the encoder saw nothing, which is painted grey.
    Without `target` (a plain MAE) that column is left out. `note` is a line below the sheet.
    """
    share = round(100 * float(hidden.detach().mean()))
    columns = [
        ("Online view", "what is to be restored", images),
        ("Seen by the encoder", f"{share} % of the patches hidden (grey)", hide_patches(images, hidden)),
        ("Restored", "hidden patches predicted, others copied", reconstructed),
    ]
    if target is not None:
        columns.append(("Target view", "what the target encoder sees", target))
    rows, width = len(images), len(columns) * (_TILE + _GAP) - _GAP + 2 * _MARGIN
    foot = _FOOT if note else _MARGIN
    height = rows * (_TILE + _GAP) - _GAP + _HEAD + foot
    with draw_figure(Path(path), width_in=width, height_in=height) as figure:
        figure.text(_MARGIN / width, 1 - 0.36 / height, title, size=15, weight="bold", color=INK, va="center")
        if note:
            figure.text(_MARGIN / width, 0.5 * foot / height, note, size=9, color=FAINT, va="center")
        for column, (name, meaning, pictures) in enumerate(columns):
            left = _MARGIN + column * (_TILE + _GAP)
            middle = (left + _TILE / 2) / width
            figure.text(middle, 1 - 0.83 / height, name, size=11, weight="bold", color=INK, ha="center")
            figure.text(middle, 1 - 1.08 / height, meaning, size=8, color=FAINT, ha="center")
            for row, picture in enumerate(pictures.detach().float().clamp(0, 1).cpu()):
                bottom = height - _HEAD - row * (_TILE + _GAP) - _TILE
                place = (left / width, bottom / height, _TILE / width, _TILE / height)
                axes = figure.add_axes(place)
                axes.set_axis_off()
                axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")


def hide_patches(
    images: Float[Tensor, "batch 3 side side"], hidden: Float[Tensor, "batch 1 side side"]
) -> Float[Tensor, "batch 3 side side"]:
    """`images` with grey wherever `hidden` is 1."""
    return torch.where(hidden > 0.5, torch.full_like(images, _GRAY), images)
