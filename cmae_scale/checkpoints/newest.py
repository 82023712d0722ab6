"""The newest training state that is whole."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cmae_scale.checkpoints.commit import find_damage, list_states, read_description
from cmae_scale.checkpoints.description import STATE_FORMAT
from cmae_scale.config.run_file import Run
from cmae_scale.core.errors import ConfigError

Found = tuple[str | None, dict[str, Any] | None]  # what is wrong with a state, or None; its description


class Chosen(NamedTuple):
    """A whole state, and what is wrong with those that are newer."""

    path: Path
    description: dict[str, Any]
    passed_over: tuple[str, ...]


def check_files(path: Path, *, rank: int = 0, ranks: int = 1) -> Found:
    """Look at the state at `path`: its description, and every `ranks`-th file by size and SHA-256."""
    try:
        description = read_description(path)
        return find_damage(path, description, rank=rank, ranks=ranks), description
    except (ValueError, KeyError, TypeError) as error:
        return str(error), None


def has_begun(run: Run) -> bool:
    """Whether a state in its folder, whole or not, is what `run` goes on from, instead of a beginning."""
    return run.settings.checkpoint.resume != "never" and bool(list_states(run.out / "checkpoints"))


def choose_state(folder: Path, *, remedy: str, check: Callable[[Path], Found] = check_files) -> Chosen | None:
    """The newest state in `folder` of which `check` finds nothing wrong; None when there is none at all.

    Raises ConfigError, which ends with `remedy`, when there are states but all are damaged: to go on as if
    there were none would lose them.
    """
    passed_over: list[str] = []
    for path in list_states(folder):
        damage, description = check(path)
        if damage is None and description is not None:
            return Chosen(path, description, tuple(passed_over))
        passed_over.append(damage or str(path))
    if passed_over:
        raise ConfigError(f"no state in {folder} is whole ({'; '.join(passed_over)}): {remedy}")
    return None


def read_newest_metadata(folder: Path) -> dict[str, Any] | None:
    """What wrote the newest state that can be read, of which nothing else is checked; None without one."""
    for path in list_states(folder):
        with suppress(ValueError):
            stamp: dict[str, Any] = read_description(path)["stamp"]
            return stamp if stamp["format"] == STATE_FORMAT else None
    return None
