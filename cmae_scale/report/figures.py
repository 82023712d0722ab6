"""What a run shows: curves from its metrics.jsonl, and its reconstructions of held-out images."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from torch import Tensor

from cmae_scale.core.errors import DataError
from cmae_scale.core.files import write_whole
from cmae_scale.core.strict_json import parse_json
from cmae_scale.core.terminal import make_safe_name

DPI = 100
LONGEST_NAME = 32
INK = "#1f2430"  # titles
FAINT = "#6b7280"  # what explains
BLUE, ORANGE, GREEN, VIOLET, RED, TEAL = "#2f6fb3", "#d9762b", "#3c8d53", "#7a5aa6", "#b8433d", "#2a8c8c"


@contextmanager
def draw_figure(path: Path, *, width_in: float, height_in: float) -> Iterator[Figure]:
    """A white figure of no window, which is at `path` as a PNG file when the block ends well, whole.

    Text is text: a $ in somebody's name begins no formula. Where no font has a character its place is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing|Tight layout not applied")
        figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        with write_whole(path) as file:
            figure.savefig(file, format="png")


def show_name(name: str) -> str:
    """Somebody's name as a picture has room for it."""
    return make_safe_name(name, longest=LONGEST_NAME)


Metrics = Mapping[str, float | int | None]

_SMOOTH_FROM = 60  # points from which a running mean is drawn over the single lines
_SMOOTH_SHARE = 0.05  # of the curve, the width of that mean
_LARGEST = 1e30  # of values that are drawn; neither is what is not finite
_TABLES = ("_per_class", "_by_lr_scale")  # endings of values that are a number for each of several things
_MARKED_UP_TO = 30  # points up to which each gets a dot: a short run has hardly a line


@dataclass(frozen=True)
class Panel:
    """One curve: the metric's name in metrics.jsonl and what a stranger should read beside it."""

    metric: str
    title: str
    axis: str
    color: str


_PANELS = (
    Panel("pixel", "Pixel loss", "mean squared error, hidden patches", BLUE),
    Panel("contrast", "Contrast loss", "before weight and scale", ORANGE),
    Panel("loss", "Total loss", "what is minimised", INK),
    Panel("knn_top1", "Nearest neighbours", "top-1 of held-out images", VIOLET),
    Panel("val_top1", "Validation", "top-1", VIOLET),
    Panel("lr", "Learning rate", "per optimizer step", GREEN),
    Panel("grad_norm", "Gradient norm", "L2, whole model", RED),
    Panel("query_spread", "Spread of queries", "1 = all around, 0 = collapsed", BLUE),
    Panel("target_distance", "Target behind online", "distance / length of the weights", ORANGE),
    Panel("samples_per_s", "Speed", "images / s, all ranks", TEAL),
    Panel("momentum", "Target momentum", "share kept per step", VIOLET),
)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in order; a torn last line, as a killed run leaves it, is left out.

    Raises DataError when the file is missing or an earlier line is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the metrics.jsonl of a run folder")
    lines = path.read_bytes().splitlines()
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = parse_json(line, finite=False)
            _check_entry(entry)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number} is no line of metrics ({error}): delete that line"
            ) from None
        metrics.append(entry)
    return metrics


def _check_entry(entry: Any) -> None:
    """Raise ValueError unless it is what a run writes: a step, and under other names numbers or nothing."""
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        raise ValueError('no "step"')
    for name, value in entry.items():
        if not (value is None or isinstance(value, int | float) or name.endswith(_TABLES)):
            raise ValueError(f'"{name}" is no number')


def write_curves(
    path: str | Path,
    *,
    metrics: Sequence[Metrics],
    title: str = "Training curves",
    chance: float | None = None,
) -> None:
    """A PNG with a panel for each metric that has something to show, over optimizer steps and epochs.

    `metrics` are lines as `read_metrics` gives them. `chance` is the contrast loss of blind guessing, drawn
    as a dashed line (ln of the global batch for InfoNCE). Left out: a contrast loss that is 0 throughout and
    the total that then equals the pixel loss (a plain MAE), a momentum that never changes, values that are
    missing or not finite. Raises DataError when `metrics` is empty.
    """
    if not metrics:
        raise DataError(f"no metrics to draw {path} from: the run has not logged a line yet")
    panels = [panel for panel in _PANELS if _is_shown(panel.metric, metrics)]
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    with draw_figure(Path(path), width_in=max(6.5, 4.4 * across), height_in=3.1 * down + 0.7) as figure:
        inch = 1 / figure.get_figheight()
        figure.text(
            0.012, 1 - 0.28 * inch, make_safe_name(title), va="center", size=15, weight="bold", color=INK
        )
        for place, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(down, across, place)
            _draw(axes, panel, metrics, chance=chance if panel.metric == "contrast" else None)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 * inch), h_pad=1.6, w_pad=1.6)


def running_mean(values: Sequence[float], *, width: int) -> list[float]:
    """Mean of the `width` values around each one (an odd number; fewer at the ends)."""
    reach = width // 2
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def _series(metric: str, metrics: Sequence[Metrics]) -> tuple[list[float], list[float]]:
    """Steps and values of the lines where the metric is a number that can be drawn."""
    steps, values = [], []
    for line in metrics:
        step, value = line.get("step"), line.get(metric)
        if step is not None and value is not None and abs(value) < _LARGEST:
            steps.append(float(step))
            values.append(float(value))
    return steps, values


def _is_shown(metric: str, metrics: Sequence[Metrics]) -> bool:
    _, values = _series(metric, metrics)
    if metric == "momentum":
        return len(set(values)) > 1
    if metric == "loss" and not _series("pixel", metrics)[1]:
        return bool(values)
    if metric in ("contrast", "loss"):
        return any(_series("contrast", metrics)[1]) and bool(values)
    return bool(values)


def _draw(axes: Any, panel: Panel, metrics: Sequence[Metrics], *, chance: float | None) -> None:
    steps, values = _series(panel.metric, metrics)
    marker = "o" if len(steps) <= _MARKED_UP_TO else ""
    if len(steps) >= _SMOOTH_FROM and panel.metric not in ("lr", "momentum"):
        width = max(3, int(_SMOOTH_SHARE * len(steps))) | 1
        axes.plot(steps, values, color=panel.color, alpha=0.3, linewidth=0.8, label="each log line")
        smooth = running_mean(values, width=width)
        axes.plot(steps, smooth, color=panel.color, linewidth=1.8, label=f"mean of {width} lines")
    else:
        axes.plot(steps, values, color=panel.color, linewidth=1.8, marker=marker, markersize=3.5)
    if chance is not None:
        axes.axhline(chance, color=FAINT, linestyle="--", linewidth=1, label=f"blind guess, {chance:.2f}")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=7.5, labelcolor=INK)
    axes.set_title(panel.title, loc="left", size=11, weight="bold", color=INK)
    axes.set_ylabel(panel.axis, size=8.5, color=FAINT)
    axes.set_xlabel(_step_label(metrics), size=8.5, color=FAINT)
    axes.grid(color="#e5e7eb", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")
    axes.tick_params(labelsize=8, color="#9ca3af", labelcolor=INK)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if panel.metric in ("lr", "samples_per_s", "query_spread"):  # zero means something
        axes.set_ylim(0, 1.15 * max(values) or 1)
    if panel.metric == "grad_norm" and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _step_label(metrics: Sequence[Metrics]) -> str:
    last = metrics[-1]
    epoch = last.get("epoch")
    return "optimizer step" if epoch is None else f"optimizer step ({last['step']} = epoch {epoch:.4g})"


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
