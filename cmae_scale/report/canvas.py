"""The look that all figures share, and how they reach the disk."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmae_scale.core.files import PART

DPI = 100
INK = "#1f2430"  # titles
FAINT = "#6b7280"  # what explains
BLUE, ORANGE, GREEN, VIOLET, RED, TEAL = "#2f6fb3", "#d9762b", "#3c8d53", "#7a5aa6", "#b8433d", "#2a8c8c"


def build_figure(*, width_in: float, height_in: float) -> Figure:
    """An empty white figure that belongs to no window and no list of figures."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: Path) -> None:
    """`figure` as a PNG file that appears whole; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    figure.savefig(part, format="png")
    part.replace(path)
