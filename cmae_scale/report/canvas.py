"""The look that all figures share, and how they reach the disk."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmae_scale.core.files import write_whole
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
