"""Reading metrics and drawing curves."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from cmae_scale.core.errors import DataError
from cmae_scale.report import read_metrics, write_curves
from cmae_scale.report.figures import _PANELS, _is_shown, running_mean


def line(step: int, **other: Any) -> dict[str, Any]:
    usual = {"step": step, "epoch": step / 100, "loss": 1.0 + 1 / step, "pixel": 1 / step, "contrast": 7.0}
    return usual | {"lr": 1e-4, "momentum": 0.996, "grad_norm": 1.0, "samples_per_s": 50.0} | other


def shown(metrics: list[dict[str, Any]]) -> list[str]:
    return [panel.metric for panel in _PANELS if _is_shown(panel.metric, metrics)]


def test_metrics_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": null}\n')
    assert read_metrics(path) == [{"step": 10, "loss": 2.5}, {"step": 20, "loss": None}]


@pytest.mark.parametrize("torn", [b'{"step": 30, "lo', b'{"step": 3', b"\xff\xfe", b"{}", b"17"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n' + torn)
    assert read_metrics(path) == [{"step": 10}]


def test_a_broken_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": \n{"step": 30}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2"):
        read_metrics(path)


def test_missing_metrics_are_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run folder"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("count", [1, 2, 29, 200])
def test_curves_of_any_length_become_a_picture(tmp_path: Path, count: int) -> None:
    path = tmp_path / "pictures" / "curves.png"
    write_curves(path, metrics=[line(step) for step in range(1, count + 1)], title="run", chance=math.log(64))
    with Image.open(path) as picture:
        assert picture.size == (1320, 690)
    assert plt.get_fignums() == []
    assert [file.name for file in path.parent.iterdir()] == ["curves.png"]


def test_no_metrics_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has not logged"):
        write_curves(tmp_path / "curves.png", metrics=[])


def test_a_plain_mae_shows_no_contrast_and_no_second_copy_of_its_loss() -> None:
    metrics = [line(step, contrast=0.0, loss=1 / step) for step in (1, 2)]
    assert shown(metrics) == ["pixel", "lr", "grad_norm", "samples_per_s"]


def test_momentum_is_shown_when_it_moves() -> None:
    assert "momentum" not in shown([line(1), line(2)])
    assert "momentum" in shown([line(1), line(2, momentum=0.997)])


def test_values_that_are_missing_or_not_finite_are_left_out(tmp_path: Path) -> None:
    metrics = [
        line(1, grad_norm=None),
        line(2, grad_norm=None, pixel=math.nan, loss=math.inf),
        line(3, grad_norm=None),
    ]
    assert "grad_norm" not in shown(metrics)
    write_curves(tmp_path / "curves.png", metrics=metrics)


def test_the_running_mean_narrows_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 4.0], width=3) == [1.5, 3.0, 4.0, 5.0]
    assert running_mean([5.0], width=3) == [5.0]
