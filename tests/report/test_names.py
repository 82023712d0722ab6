"""Names in pictures are somebody else's: whatever they hold, it is drawn, without a word."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import rcParams
from PIL import Image

from cmae_scale.report.confusion import write_confusion
from cmae_scale.report.convergence import write_comparison, write_convergence
from cmae_scale.report.figures import draw_figure, show_name, write_curves

NAMES = [
    "$",
    "a$b$c",
    r"$\frac{1$",
    r"\$x",
    "{%}^_&#~\\",
    "n" * 5000,
    "two\nlines\r\n",
    "猫 und 🐈",
    "قطة",
    "\x1b[2J\0\a",
    "\ud800",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def draw_all(folder: Path, names: list[str]) -> None:
    count = len(names)
    write_confusion(folder / "confusion.png", confusion=torch.eye(count, dtype=torch.int64), names=names)
    write_convergence(folder / "lines.png", curves={name: [(1, 0.5)] for name in names}, title=names[0])
    write_comparison(folder / "bars.png", scores={name: dict.fromkeys(names[:3], 0.5) for name in names})
    write_curves(folder / "curves.png", metrics=[{"step": 1, "loss": 1.0}], title=names[0])


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_is_drawn_as_text(folder: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_all(folder, [name, f"{name}$", "dog"])
    for path in folder.iterdir():
        with Image.open(path) as picture:
            picture.load()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=2, max_size=4, unique=True))
def test_any_names_at_all_are_drawn(folder: Path, names: list[str]) -> None:
    draw_all(folder, names)


def test_a_dollar_is_shown_as_a_dollar_and_nothing_global_changes(tmp_path: Path) -> None:
    before = dict(rcParams)
    with draw_figure(tmp_path / "a.png", width_in=2, height_in=2) as figure:
        text = figure.text(0, 0, "$x$ and $y$")
        assert not text.get_parse_math()
    assert dict(rcParams) == before
    assert show_name("$x$") == "$x$"
    assert len(show_name("n" * 5000)) == 32


def test_a_picture_that_fails_leaves_no_part(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), draw_figure(tmp_path / "a.png", width_in=2, height_in=2):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
