"""Code that serves every kind of run names settings as pre-training has them; a run's own name comes out."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.run_file import Run, RunKind, name_settings
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import DataError

# what only a pre-training run has, and only its code speaks of
PRETRAINING = r"cmae\.(compile|cuda_graphs|fused_views|deterministic|model|monitor\.knn)\b"


def texts(folder: Path) -> Iterator[str]:
    """Every string of the code that is no docstring."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(node.value)
            for parent in ast.walk(tree)
            if isinstance(parent, ast.Module | ast.ClassDef | ast.FunctionDef)
            for node in parent.body[:1]
            if isinstance(node, ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value


@pytest.mark.parametrize("package", ["engine", "data"])
def test_a_transfer_run_is_advised_no_setting_that_it_refuses(package: str, repository: Path) -> None:
    found = [text for text in texts(repository / "cmae_scale" / package) if "cmae." in text]
    assert found, "or this test looks in the wrong place"
    for text in found:
        assert "cmae." not in re.sub(PRETRAINING, "", name_settings(text, "transfer")), text


@pytest.mark.parametrize(
    ("text", "kind", "named"),
    [
        ("lower cmae.schedule.base_lr.", "transfer", "lower transfer.schedule.base_lr."),
        ("cmae.data.shards=x, cmae.out", "transfer", "transfer.data.shards=x, transfer.out"),
        ("cmae.model.remat stays", "transfer", "cmae.model.remat stays"),
        ("/data/cmae.data.tar and official cmae.py", "transfer", "/data/cmae.data.tar and official cmae.py"),
        ("cmae.data.shards", "cmae", "cmae.data.shards"),
    ],
)
def test_settings_are_named_by_the_object_they_stand_in(text: str, kind: RunKind, named: str) -> None:
    assert name_settings(text, kind) == named


def test_an_error_of_a_transfer_run_reaches_people_with_its_own_settings(
    on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    settings = TransferConfig.model_validate(
        {
            "encoder": {"place": "x"},
            "task": {"finetune": {}},
            "data": {"shards": "x", "val_shards": "y"},
            "out": str(tmp_path),
        }
    )

    def fail() -> str:
        from cmae_scale.engine.process.lifecycle import run_context
        from cmae_scale.engine.process.signals import StopRequest

        with (
            pytest.raises(DataError) as error,
            run_context(Run(Path("run.json"), settings, {}), StopRequest()),
        ):
            raise DataError("nothing matches x: look at the pattern in cmae.data.shards")
        return str(error.value)

    (told,) = on_ranks(fail, ranks=1)
    assert told == "nothing matches x: look at the pattern in transfer.data.shards"
    assert json.loads((tmp_path / "exit.json").read_text())["cause"] == told
