"""Training states on disk: a state is committed by a rename, or it does not exist.

    checkpoints/
      step_00000500/        DeepSpeed's own files, one per rank and kind
        state.json          what they are: step, stamp, size and SHA-256 of every file
      latest                name of the newest, for DeepSpeed's tools; this module trusts the folders alone
      step_00001000.part/   left by an interrupted save: never read, removed by the next save

All functions are called by all ranks together; what they find out on one rank, all ranks know.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmae_scale.core.collectives import barrier, gather_objects
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, sync, sync_tree, write_text
from cmae_scale.core.world import World
from cmae_scale.engine.states.stamp import Stamp

_COMMITTED = re.compile(r"step_(\d{8,})")
_DESCRIPTION = "state.json"
# what torch.save and the file system raise when a disk is full, read-only or gone
_SAVE_ERRORS = (OSError, RuntimeError)


@dataclass(frozen=True)
class Loaded:
    """A state that was taken up. `passed_over` says what was wrong with newer ones."""

    step: int
    target_masters: dict[str, Tensor] | None  # fp32 masters of this rank
    passed_over: tuple[str, ...]


def list_states(folder: Path) -> list[Path]:
    """Committed states, newest first. Half-written ones have another name."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _COMMITTED.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def save_state(
    engine: Any,
    folder: Path,
    *,
    step: int,
    stamp: Stamp,
    target_masters: dict[str, Tensor] | None,
    keep: int,
    world: World,
) -> str | None:
    """Write the state after `step` optimizer steps and drop all but the newest `keep`. None, or what failed.

    Ranks write into a ".part" folder; only when all have done so does the first rank sync it to disk, rename
    it and point `latest` to it. So at every moment the previous state or the new one is whole. A full or lost
    disk on any rank leaves the previous states as they are.
    """
    part = folder / f"step_{step:08d}{PART}"
    failures: list[str] = []
    with _noting(failures):
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{PART}"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            part.mkdir()
    if failed := _join(failures):
        return failed
    with _guarded_writes(engine, failures):
        client = {"step": step, "target_masters": target_masters}
        engine.save_checkpoint(str(folder), tag=part.name, client_state=client, save_latest=False)
    files: dict[str, dict[str, Any]] = {}
    if not _join(failures):
        with _noting(failures):
            files = describe_files(part, world=world)
    described = {name: entry for share in gather_objects(files) for name, entry in share.items()}
    failed = _join(failures)
    if world.is_first:
        with _noting(failures):
            if failed:
                shutil.rmtree(part, ignore_errors=True)
            else:
                description = {"step": step, "stamp": asdict(stamp), "files": described}
                _commit(part, description=description, keep=keep)
    return failed or _join(failures)


def load_newest(engine: Any, folder: Path, *, stamp: Stamp, world: World) -> Loaded | None:
    """Take up the newest state in `folder` that is whole; None when there is none at all.

    Every file's size and SHA-256 is checked before anything is read from it. Raises ConfigError when a state
    belongs to another kind of run, or when there are states but all are damaged: starting over silently would
    lose them.
    """
    passed_over: list[str] = []
    for path in list_states(folder):
        damage = find_damage(path, world=world)
        if damage is None:
            description = json.loads((path / _DESCRIPTION).read_text())
            step = int(description["step"])
            stamp.check(description["stamp"], path=path, step=step)
            _, client = engine.load_checkpoint(str(folder), tag=path.name)
            return Loaded(step, client["target_masters"], tuple(passed_over))
        passed_over.append(damage)
    if passed_over:
        raise ConfigError(
            f"no state in {folder} is whole ({'; '.join(passed_over)}): restore one, or start over with "
            "--set cmae.checkpoint.resume=never"
        )
    return None


def find_damage(path: Path, *, world: World) -> str | None:
    """What is wrong with the state at `path`, or None. Ranks share the hashing."""
    try:
        listed = json.loads((path / _DESCRIPTION).read_text())["files"]
        names = sorted(listed)
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage: str | None = f"{path / _DESCRIPTION} is damaged ({error})"
    else:
        damage = next(
            (
                f"{path / name} is damaged or missing"
                for name in names[world.rank :: world.size]
                if _describe_file(path / name) != listed[name]
            ),
            None,
        )
    return next((found for found in gather_objects(damage) if found), None)


def describe_files(folder: Path, *, world: World) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of this rank's share of the files below `folder`, by their place in it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    described = {}
    for name in names[world.rank :: world.size]:
        entry = _describe_file(folder / name)
        assert entry is not None
        described[name] = entry
    return described


def _describe_file(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    """hashlib.file_digest of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest


def _commit(part: Path, *, description: dict[str, Any], keep: int) -> None:
    folder, final = part.parent, part.with_name(part.name.removesuffix(PART))
    write_text(part / _DESCRIPTION, json.dumps(description, indent=2) + "\n")
    sync_tree(part)
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    sync(folder)
    write_text(folder / "latest", final.name)
    for old in list_states(folder)[keep:]:
        shutil.rmtree(old)


@contextmanager
def _noting(failures: list[str]) -> Iterator[None]:
    """Let a write that fails on this rank wait to be told until all ranks are asked."""
    try:
        yield
    except _SAVE_ERRORS as error:
        failures.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


@contextmanager
def _guarded_writes(engine: Any, failures: list[str]) -> Iterator[None]:
    """Keep a failed write of one rank from leaving the others waiting in DeepSpeed's barriers."""
    writer = engine.checkpoint_engine
    original = writer.save

    def save(state_dict: Any, path: str) -> None:  # DeepSpeed passes them by name
        with _noting(failures):
            original(state_dict, path)

    copy_scripts = engine._copy_recovery_script  # conversion scripts that DeepSpeed puts beside its files

    def copy(save_path: str) -> None:
        with _noting(failures):
            copy_scripts(save_path)

    writer.save, engine._copy_recovery_script = save, copy
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script
        barrier()


def _join(failures: list[str]) -> str | None:
    """The failures of all ranks, or None; every rank gets the same answer."""
    told = [failure for share in gather_objects(failures) for failure in share]
    return "; ".join(dict.fromkeys(told)) or None
