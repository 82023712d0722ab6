"""The protocol by which a state comes to be: committed by one rename, or it does not exist.

    checkpoints/
      step_00000500/          a committed state
        rank_00000.safetensors ...  each rank's share (see shards.py)
        state.json            step, stamp, counters, run file; size and SHA-256 of every share
        state.sha256          SHA-256 of state.json, as sha256sum writes it
      latest                  name of the newest, a hint for people; folders alone decide
      step_00001000.part/     left by an interrupted save: never read, removed by the next save

A crash between any two of the functions here leaves the previous state, or the new one, whole.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from cmae_scale.checkpoints.description import check_description
from cmae_scale.core.credentials import write_settings
from cmae_scale.core.files import PART, digest_file, remove, sync, write_text
from cmae_scale.core.strict_json import parse_json

_COMMITTED = re.compile(r"step_([0-9]{8,18})")
DESCRIPTION, SEAL = "state.json", "state.sha256"

FileEntry = dict[str, Any]  # bytes, sha256


def list_states(folder: Path) -> list[Path]:
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
    for old in list_states(folder)[keep:]:
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
