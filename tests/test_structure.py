"""The rules of the tree: who imports whom, and what every file keeps to."""

import ast
import subprocess
import sys
from collections.abc import Mapping
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


def list_imports(name: str, modules: Mapping[str, Path]) -> set[str]:
    """Modules of the package that one imports, also inside of functions, and the packages it lies in."""
    found = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}
    for node in ast.walk(ast.parse(modules[name].read_text())):
        match node:
            case ast.ImportFrom(module=str(module), names=names):
                found |= {module, *(f"{module}.{alias.name}" for alias in names)}
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
    return found & modules.keys()


def test_pretraining_reaches_few_files(repository: Path) -> None:
    paths = {path.relative_to(repository): path for path in (repository / "cmae_scale").rglob("*.py")}
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in paths.items()
    }
    reached, ahead = set[str](), {"cmae_scale.pretrain"}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead |= list_imports(name, modules) - reached
    files = [name for name in reached if modules[name].name != "__init__.py"]
    assert "cmae_scale.models.cmae" in files
    assert len(files) < 110, sorted(files)
