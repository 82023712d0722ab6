"""Measured claims as JSON: what was run, on what, how often, and how the figures spread."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from cmae_scale.core.credentials import mask_tree, write_settings

PACKAGES = (
    *("torch", "torchvision", "deepspeed", "webdataset"),
    *("pillow", "numpy", "simplejpeg", "nvidia-nvimgcodec-cu12"),
)


def summarise(values: Sequence[float]) -> dict[str, float | int]:
    """How often, median, lowest and highest."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


class Timing(NamedTuple):
    """Seconds that something took, of processors and of the clock."""

    cpu_s: float
    wall_s: float


def summarise_timings(timings: Sequence[Timing], *, per: str) -> dict[str, dict[str, float | int]]:
    """How the seconds of some timings spread, CPU time and the clock's."""
    return {
        f"cpu_s_per_{per}": summarise([timing.cpu_s for timing in timings]),
        f"wall_s_per_{per}": summarise([timing.wall_s for timing in timings]),
    }


def write_record(path: Path, *, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write a record with the commit, hardware and versions of this moment."""
    record = {
        "commit": read_commit(),
        "hardware": describe_hardware(),
        "versions": {name: found for name in PACKAGES if (found := _find_version(name))},
        "config": mask_tree(config),
        "results": dict(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_settings(path, json.dumps(record, indent=2) + "\n")


def read_commit() -> str:
    """The commit of the code that runs, with a + if files differ from it; "unknown" outside of a checkout."""
    here = Path(__file__).parent
    commit = _ask_git(here, "rev-parse", "--short=12", "HEAD")
    changed = _ask_git(here, "status", "--porcelain", "--untracked-files=no", ".")
    return "unknown" if commit is None else commit + ("+" if changed else "")


def describe_hardware() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _ask_git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(folder), *words],  # noqa: S607 -- wherever git is
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
