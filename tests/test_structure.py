"""The rules of the tree: who imports whom, and what every file keeps to."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "."], id="lint"),
        pytest.param(["ruff", "format", "--check", "."], id="format"),
        pytest.param(["mypy"], id="types", marks=pytest.mark.slow),
    ],
)
def test_the_code_passes(command: list[str], repository: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_go_down_only(repository: Path) -> None:
    linter = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", linter], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_files_are_stories(repository: Path) -> None:
    for path in (repository / "cmae_scale").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 170, path
        assert "\nclass " not in text, path


def test_nothing_can_run_code_from_data(repository: Path) -> None:
    for folder in ("cmae_scale", "data_prep"):
        for path in (repository / folder).rglob("*.py"):
            text = path.read_text()
            for danger in ("pickle.load", "weights_only=False", "os.system", "eval(", "exec("):
                found = text.replace(".eval(", "")
                assert danger not in found, f"{path}: {danger}"
