"""What an installation brings: locked packages, a core that needs no extra, commands and run files."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = [
    Requirement(line)
    for lines in PROJECT["optional-dependencies"].values()
    for line in lines
    if not line.startswith(PROJECT["name"])
]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
MACHINES = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]


def read_constraints() -> list[Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def applies(requirement: Requirement, environment: dict[str, str] | None = None, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**(environment or {}), "extra": extra})


def closure(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """Every installed distribution that these bring, by name."""
    found: dict[str, Distribution] = {}
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found[key[0]] = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        needs = [Requirement(line) for line in found[key[0]].requires or ()]
        waiting += [
            need for need in needs if any(applies(need, extra=extra) for extra in ("", *requirement.extras))
        ]
    return found


def test_every_constraint_is_one_version_that_any_pip_can_read() -> None:
    for constraint in read_constraints():
        assert re.fullmatch(r"==[^*,]+", str(constraint.specifier)), constraint
        assert not constraint.extras, constraint
        assert constraint.url is None, constraint


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("system", "processor"), MACHINES, ids=[" ".join(machine) for machine in MACHINES])
def test_what_the_project_asks_for_has_one_version_everywhere(
    python: str, system: str, processor: str
) -> None:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.7",
        "sys_platform": system,
        "platform_system": system.title(),
        "platform_machine": processor,
    }
    pinned = [constraint for constraint in read_constraints() if applies(constraint, environment)]
    for requirement in (*CORE, *EXTRAS):
        if not applies(requirement, environment):
            continue
        name = canonicalize_name(requirement.name)
        versions = [pin for pin in pinned if canonicalize_name(pin.name) == name]
        assert len(versions) == 1, f"{requirement}: {versions}"
        version = str(versions[0].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} is not {version}"


def test_nothing_is_installed_that_constraints_do_not_name() -> None:
    pins = {canonicalize_name(pin.name): pin.specifier for pin in read_constraints() if applies(pin)}
    for requirement in (*CORE, *EXTRAS):
        name = canonicalize_name(requirement.name)
        found = closure([requirement])
        if name in found and not pins[name].contains(found[name].version):
            pytest.skip(f"not installed with constraints.txt: {name} is {found[name].version}")
    assert not closure([*CORE, *EXTRAS]).keys() - pins.keys()


def test_the_core_stays_small() -> None:
    assert len(CORE) <= 14


def find_modules_of_extras() -> list[str]:
    """Top-level modules that no core package brings."""
    others = closure(EXTRAS).keys() - closure(CORE).keys()
    return [
        module
        for module, owners in sorted(packages_distributions().items())
        if all(canonicalize_name(owner) in others for owner in owners)
    ]


def test_every_module_imports_with_the_core_alone(repository: Path) -> None:
    hidden = find_modules_of_extras()
    assert {"pyarrow", "simplejpeg", "moto", "pytest"} <= {*hidden}
    modules = [
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for folder in ("cmae_scale", "data_prep")
        for path in sorted((repository / folder).rglob("[!_]*.py"))
    ]
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({hidden!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the project's wheel holds, as an installation leaves it."""
    tree, site = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site")
    for name in ("cmae_scale", "data_prep", "ds_configs"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tree)], cwd=tree, check=True, capture_output=True)
    (wheel,) = tree.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    return site


def console_commands(site: Path) -> dict[str, str]:
    (info,) = site.glob("*.dist-info")
    return {entry.name: entry.value for entry in Distribution.at(info).entry_points}


def call(site: Path, command: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a console command of an installation from a folder of one's own."""
    module, function = console_commands(site)[command].split(":")
    program = f"import sys; from {module} import {function}; sys.exit({function}())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


def test_a_wheel_holds_every_file(installed: Path, repository: Path) -> None:
    for folder, pattern in (("cmae_scale", "*.py"), ("data_prep", "*.py"), ("ds_configs", "*.json")):
        tree = {path.relative_to(repository) for path in (repository / folder).rglob(pattern)}
        assert tree == {path.relative_to(installed) for path in (installed / folder).rglob(pattern)}


def test_every_command_file_is_a_console_command(installed: Path, repository: Path) -> None:
    files = [*(repository / "cmae_scale").glob("[!_]*.py"), repository / "data_prep" / "make_shards.py"]
    files.append(repository / "data_prep" / "check_shards.py")
    assert {f"cmae-{path.stem.replace('_', '-')}" for path in files} == console_commands(installed).keys()


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_an_installed_command_says_how_it_is_used(installed: Path, tmp_path: Path, command: str) -> None:
    done = call(installed, command, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.parametrize("name", ["quickstart", "ds_configs/quickstart.json"])
def test_an_installed_command_finds_the_shipped_run_files(installed: Path, tmp_path: Path, name: str) -> None:
    done = call(
        installed,
        "cmae-plan",
        "--deepspeed_config",
        name,
        "--images",
        "1437",
        "--gpu",
        "cpu",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_a_mistake_of_the_user_is_one_sentence_of_a_console_command(installed: Path, tmp_path: Path) -> None:
    done = call(installed, "cmae-check-shards", "nowhere", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_continuous_integration_does_what_the_readme_says() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text().replace("--quiet ", "").replace("uv pip", "pip")
    commands = [
        line for line in (REPOSITORY / "README.md").read_text().splitlines() if ".venv/bin/activate" in line
    ]
    assert len(commands) == 2
    for command in commands:
        for part in command.split(" && "):
            assert part in script or ".venv" in part, part
