"""Accuracy against epochs for several encoders, and the scores of a study side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import PercentFormatter

from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import make_safe_name
from cmae_scale.report.figures import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    RED,
    TEAL,
    VIOLET,
    draw_figure,
    show_name,
)

Curve = Sequence[tuple[float, float]]  # epoch, accuracy

_COLORS = (ORANGE, BLUE, GREEN, VIOLET, RED, TEAL)


def find_overtake(curve: Curve, final: float) -> float | None:
    """The first epoch at which `curve` is above another's final accuracy; None if it never is."""
    return next((epoch for epoch, accuracy in curve if accuracy > final), None)


def write_convergence(
    path: str | Path, *, curves: Mapping[str, Curve], title: str = "Fine-tuning", axis: str = "top-1"
) -> None:
    """A PNG with a line per encoder. Source: the paper's figure 4b."""
    if not any(curves.values()):
        raise DataError(f"no accuracies to draw {path} from: the runs have not been validated yet")
    with draw_figure(Path(path), width_in=6.5, height_in=4.2) as figure:
        axes = figure.add_subplot()
        for (name, curve), color in zip(curves.items(), _COLORS * len(curves), strict=False):
            epochs, accuracies = [point[0] for point in curve], [point[1] for point in curve]
            label = f"{show_name(name)}, {accuracies[-1]:.1%} at the end" if accuracies else show_name(name)
            axes.plot(epochs, accuracies, color=color, linewidth=1.8, marker="o", markersize=3.5, label=label)
        _finish(axes, title=title)
        axes.set_xlabel("epochs of fine-tuning", size=8.5, color=FAINT)
        axes.set_ylabel(axis, size=8.5, color=FAINT)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        figure.tight_layout()


def write_comparison(
    path: str | Path, *, scores: Mapping[str, Mapping[str, float]], title: str = "What was learned"
) -> None:
    """A PNG with a group of bars per task and a bar per encoder; `scores[encoder][task]` are accuracies."""
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    if not tasks:
        raise DataError(f"no scores to draw {path} from: no cell of the study is finished")
    with draw_figure(Path(path), width_in=max(5.0, 1.2 + 1.9 * len(tasks)), height_in=4.0) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(scores)
        for place, ((name, found), color) in enumerate(
            zip(scores.items(), _COLORS * len(scores), strict=False)
        ):
            lefts = [number + (place - (len(scores) - 1) / 2) * width for number in range(len(tasks))]
            heights = [found.get(task, 0.0) for task in tasks]
            bars = axes.bar(lefts, heights, width * 0.92, color=color, label=show_name(name))
            axes.bar_label(bars, [f"{height:.1%}" for height in heights], size=7.5, color=INK, padding=2)
        _finish(axes, title=title)
        axes.set_xticks(range(len(tasks)), [show_name(task) for task in tasks], color=INK)
        axes.set_ylabel("top-1", size=8.5, color=FAINT)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        figure.tight_layout()


def _finish(axes: object, *, title: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.set_title(make_safe_name(title), loc="left", size=11, weight="bold", color=INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.tick_params(labelsize=8, color="#9ca3af", labelcolor=INK)
