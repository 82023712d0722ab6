"""Classes of any name, in a run that draws them and in one whose pictures cannot be drawn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

CLASSES = ["$", "$\\frac{a$\x1b[2J", "猫\n" * 9]


@pytest.fixture
def odd_classes(shards: Path, tmp_path: Path) -> str:
    """An override that has a run read shards whose classes have odd names."""
    for split in ("train", "val"):
        folder = tmp_path / split
        shutil.copytree(shards / split, folder)
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, "classes": CLASSES}))
    return f'transfer.data={{"shards": "{tmp_path}/train", "val_shards": "{tmp_path}/val"}}'


@pytest.mark.dist
@pytest.mark.parametrize("task", [{"knn": {"k": 5}}, {"linear": {}}], ids=["knn", "linear"])
def test_results_tell_classes_of_any_name(
    arguments: Callable[..., list[str]],
    transfer: Callable[..., list[int]],
    odd_classes: str,
    tmp_path: Path,
    task: dict[str, object],
) -> None:
    assert transfer(arguments(task, odd_classes)) == [0]
    results = (tmp_path / "run" / "results.json").read_text()
    assert all(json.dumps(name) in results for name in CLASSES)
    assert (tmp_path / "run" / "confusion.png").stat().st_size


@pytest.mark.dist
def test_results_are_written_before_pictures(
    arguments: Callable[..., list[str]],
    transfer: Callable[..., list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cmae_scale.tasks.validator.write_confusion", fail)
    assert transfer(arguments({"knn": {"k": 5}})) == [1]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn_images"] == 21
    assert (tmp_path / "run" / "predictions.csv").is_file()
