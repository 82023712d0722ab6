"""A checkpoint on disk: committed by one rename, checked before it is read, the newest whole one chosen.

    checkpoints/
      step_00000500/          a committed checkpoint
        rank_00000.safetensors ...  each rank's file (see files.py)
        state.json            step, stamp, counters, run file; size and SHA-256 of every share
        state.sha256          SHA-256 of state.json, as sha256sum writes it
      latest                  name of the newest, a hint for people; folders alone decide
      step_00001000.part/     left by an interrupted save: never read, removed by the next save

A crash between any two of the functions here leaves the previous checkpoint, or the new one, whole.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmae_scale.config.run_file import Run
from cmae_scale.core.credentials import write_settings
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, digest_file, remove, sync, write_text
from cmae_scale.core.strict_json import parse_json

STATE_FORMAT = 2
Count = Annotated[int, Field(ge=0)]
ShareName = Annotated[str, Field(pattern=r"^rank_[0-9]{5,}\.safetensors$")]


class _Part(BaseModel):
    """A part of a state.json: what is read of it has these names and types."""

    model_config = ConfigDict(strict=True)


class _Metadata(_Part):
    kind: dict[str, Any]
    ranks: int
    zero_stage: int
    precision: str
    run: dict[str, Any]
    attention: dict[str, str] = {}


class _Counters(_Part):
    global_steps: Count
    global_samples: Count
    skipped_steps: Count
    lr: list[float]
    scheduler: dict[str, Any] | None
    scaler: dict[str, int | float | None]  # of bf16, which needs none, nothing is known
    grad_scaler: dict[str, Any] | None


class _File(_Part):
    bytes: Count
    sha256: str


class _Description(_Part):
    step: Count
    stamp: _Metadata
    counters: _Counters
    extra: dict[str, Any]
    files: Annotated[dict[ShareName, _File], Field(min_length=1)]


def check_description(description: Any, *, step: int) -> None:
    """Raise ValueError unless the content of a state.json has all that is read of it, and is of `step`.

    Of another format only that is asked of it which `CheckpointMetadata.compare` needs to say so.
    """
    try:
        if description["stamp"]["format"] == STATE_FORMAT:
            _Description.model_validate(description)
        if description["step"] != step:
            raise ValueError(f"it says step {description['step']}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (LookupError, TypeError) as error:
        raise ValueError(f"no step or no format: {error}") from None


_COMMITTED = re.compile(r"step_([0-9]{8,18})")
DESCRIPTION, SEAL = "state.json", "state.sha256"


class FileEntry(TypedDict):
    """What a state's description says of one of its files."""

    bytes: int
    sha256: str


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed states, newest first. Half-written ones have another name."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _COMMITTED.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def read_step(path: Path) -> int:
    """The step of the state in a folder of that name. Raises ValueError for a name that no state has."""
    match = _COMMITTED.fullmatch(path.resolve().name)
    if match is None:
        raise ValueError("its folder is no longer called step_ and its step in eight digits")
    return int(match[1])


def name_part(folder: Path, *, step: int) -> Path:
    """Where the state of `step` is written before it is one."""
    return folder / f"step_{step:08d}{PART}"


def clear_leftovers(folder: Path) -> None:
    """Remove what interrupted saves have left."""
    for leftover in folder.glob(f"*{PART}"):
        remove(leftover)


def describe_file(path: Path) -> FileEntry:
    """Size and SHA-256. Raises OSError when it cannot be read."""
    return {"bytes": path.stat().st_size, "sha256": digest_file(path)}


def write_description(part: Path, description: dict[str, Any]) -> None:
    """What the state is, and the seal by which a change of a single bit of that is seen."""
    text = json.dumps(description, indent=1) + "\n"
    write_settings(part / DESCRIPTION, text)
    write_text(part / SEAL, f"{hashlib.sha256(text.encode()).hexdigest()}  {DESCRIPTION}\n")
    sync(part)


def commit(part: Path) -> Path:
    """Make it a state. An older one of the same step, whatever its condition, gives way."""
    final = part.with_name(part.name.removesuffix(PART))
    remove(final)
    part.rename(final)
    sync(final.parent)
    return final


def point_latest(final: Path) -> None:
    """Say which is the newest, for people and other tools."""
    write_text(final.parent / "latest", final.name)


def drop_old(folder: Path, *, keep: int, keep_every_steps: int | None) -> None:
    """Remove all but the newest `keep` states and those at multiples of `keep_every_steps`."""
    for old in list_checkpoints(folder)[keep:]:
        if keep_every_steps is None or read_step(old) % keep_every_steps:
            remove(old)


def read_description(path: Path) -> dict[str, Any]:
    """The description of the state at `path`. Raises ValueError when it is not as it was written."""
    try:
        content, seal = (path / DESCRIPTION).read_bytes(), (path / SEAL).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / DESCRIPTION} or its seal cannot be read ({error})") from None
    if seal != f"{hashlib.sha256(content).hexdigest()}  {DESCRIPTION}\n":
        raise ValueError(f"{path / DESCRIPTION} is damaged")
    try:
        description: dict[str, Any] = parse_json(content)
        check_description(description, step=read_step(path))
    except ValueError as error:
        raise ValueError(f"{path / DESCRIPTION} is not as a run writes it ({error})") from None
    return description


def find_damage(path: Path, description: dict[str, Any], *, rank: int, ranks: int) -> str | None:
    """What is wrong with the files that are this rank's to check, or None."""
    files: dict[str, FileEntry] = description["files"]
    for name in sorted(files)[rank::ranks]:
        try:
            entry = describe_file(path / name)
        except OSError as error:
            return f"{path / name} cannot be read ({error.strerror})"
        if entry != files[name]:
            return f"{path / name} is damaged"
    return None


Found = tuple[str | None, dict[str, Any] | None]  # what is wrong with a state, or None; its description


class Chosen(NamedTuple):
    """A whole checkpoint, and what is wrong with those that are newer."""

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
    """Whether `run` goes on from a checkpoint in its folder, whole or not, instead of beginning."""
    return run.settings.checkpoint.resume != "never" and bool(list_checkpoints(run.out / "checkpoints"))


def choose_checkpoint(
    folder: Path, *, remedy: str, check: Callable[[Path], Found] = check_files
) -> Chosen | None:
    """The newest checkpoint in `folder` of which `check` finds nothing wrong; None when there is none at all.

    Raises ConfigError, which ends with `remedy`, when there are states but all are damaged: to go on as if
    there were none would lose them.
    """
    passed_over: list[str] = []
    for path in list_checkpoints(folder):
        damage, description = check(path)
        if damage is None and description is not None:
            return Chosen(path, description, tuple(passed_over))
        passed_over.append(damage or str(path))
    if passed_over:
        raise ConfigError(f"no checkpoint in {folder} is whole ({'; '.join(passed_over)}): {remedy}")
    return None


def read_newest_metadata(folder: Path) -> dict[str, Any] | None:
    """What wrote the newest checkpoint that can be read. Nothing else of it is checked; None without one."""
    for path in list_checkpoints(folder):
        with suppress(ValueError):
            stamp: dict[str, Any] = read_description(path)["stamp"]
            return stamp if stamp["format"] == STATE_FORMAT else None
    return None
