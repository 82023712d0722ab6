"""Which class is taken for which: a confusion matrix as a picture."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from cmae_scale.report.figures import FAINT, INK, draw_figure, show_name

_NAMED_UP_TO = 40  # classes whose names can be read at the edges
_COUNTED_UP_TO = 20  # classes whose shares can be read in the cells


def write_confusion(
    path: str | Path, *, confusion: Int64[Tensor, "classes classes"], names: Sequence[str]
) -> None:
    """A PNG whose cell in row i and column j is the share of class i's images that were taken for class j."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    count, names = len(names), [show_name(name) for name in names]
    side = min(11.0, max(4.5, 0.42 * count)) if count <= _NAMED_UP_TO else 7.0
    with draw_figure(Path(path), width_in=side + 1.6, height_in=side + 1.2) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if count <= _NAMED_UP_TO:
            axes.set_xticks(range(count), names, rotation=60, ha="right", size=8, color=INK)
            axes.set_yticks(range(count), names, size=8, color=INK)
        if count <= _COUNTED_UP_TO:
            for row, line in enumerate(shares.tolist()):
                for column, share in enumerate(line):
                    if share >= 0.005:
                        color = "white" if share > 0.55 else INK
                        axes.text(
                            column, row, f"{share:.0%}"[:-1], ha="center", va="center", size=7, color=color
                        )
        right = int(confusion.trace()) / max(1, int(confusion.sum()))
        title = f"Confusion, {right:.1%} of {int(confusion.sum()):,} images right"
        axes.set_title(title, loc="left", size=11, weight="bold", color=INK)
        axes.set_xlabel("taken for (% of the row's images)", size=8.5, color=FAINT)
        axes.set_ylabel("class", size=8.5, color=FAINT)
        axes.tick_params(length=0)
        figure.colorbar(image, fraction=0.04, pad=0.02)
        figure.tight_layout()
