"""Saving and taking up a run's state, by all ranks together: what one rank finds out, all ranks know.

There is one kind of state. Every rank writes only what it holds, so saving needs no communication; a
parameter's elements are stored by name and range, so any number of ranks at any ZeRO stage can take them up.
Source: the need is DeepSpeed's: its own checkpoints are bound to rank count and stage, its universal ones do
not cross between stages 1/2 and 3, and both are pickles.
"""

import copy
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmae_scale.checkpoints import commit
from cmae_scale.checkpoints.commit import FileEntry, Found, check_files, choose_checkpoint
from cmae_scale.checkpoints.files import CheckpointReader, rank_file_name, write_rank_file
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.world import World
from cmae_scale.engine.checkpoint.metadata import CheckpointMetadata
from cmae_scale.engine.zero.partition_map import count_elements, list_partitions
from cmae_scale.engine.zero.partitions import Master
from cmae_scale.engine.zero.state import read_content, read_counters, write_content, write_counters

# what PyTorch and the file system raise when a disk is full, read-only or gone
_SAVE_ERRORS = (OSError, RuntimeError)


@dataclass(frozen=True)
class Loaded:
    """A state that was taken up. `notices` say what else the user should know about it."""

    step: int
    extra: dict[str, Any]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay: the `newest`, and those at multiples of `every_steps`."""

    newest: int
    every_steps: int | None = None


class Snapshot:
    """Memory of this machine for one state, kept from save to save, so that training may change its own."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of `content` as it is now. What lies on a GPU comes through page-locked memory."""
        for name, tensor in content.items():
            old = self._memory.get(name)
            if old is None or (old.shape, old.dtype) != (tensor.shape, tensor.dtype):
                self._memory[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda and tensor.numel() > 0
                )
            self._memory[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in content.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._memory[name] for name in content}


class PendingSave:
    """A state on its way to the disk. All ranks call `commit` together, once."""

    def __init__(
        self,
        part: Path,
        description: dict[str, Any],
        write: Callable[[], FileEntry],
        *,
        keeping: Keeping,
        world: World,
        is_beside: bool,
    ) -> None:
        self.step: int = description["step"]
        self.took_s = 0.0  # until this rank's file was there
        self._part, self._description = part, description
        self._keeping, self._world = keeping, world
        self._found: tuple[str | None, FileEntry | None] = ("it was not written to its end", None)
        self._started_s = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=(write,), name="save", daemon=True)
        if is_beside:
            self._thread.start()
        else:
            self._write(write)

    @property
    def is_written(self) -> bool:
        """Whether this rank's file is there, or cannot be."""
        return not self._thread.is_alive()

    def commit(self) -> str | None:
        """Wait for the files of all ranks, and make them a state. None, or what failed."""
        if self._thread.ident is not None:
            self._thread.join()
        shares = gather_objects(self._found)
        failed = _join(failure for failure, _ in shares)
        if failed:
            _on_first(self._world, lambda: shutil.rmtree(self._part, ignore_errors=True))
            return failed
        description = {**self._description, "files": _name_files([entry for _, entry in shares])}
        return _on_first(self._world, lambda: _commit(self._part, description, keeping=self._keeping))

    def _write(self, write: Callable[[], FileEntry]) -> None:
        self._found = _try(write)
        self.took_s = time.monotonic() - self._started_s


def begin_save(
    engine: Any,
    folder: Path,
    *,
    step: int,
    metadata: CheckpointMetadata,
    masters: Mapping[str, Master],
    averages: Mapping[str, Master],
    extra: Mapping[str, Any],
    keeping: Keeping,
    world: World,
    snapshot: Snapshot | None = None,
) -> PendingSave | str:
    """Write the state after `step` optimizer steps: it counts, and older ones go, once it is committed.

    With a `snapshot` it is copied there and written beside what follows; without, it is on disk on return.
    `masters` and `averages` are those of `list_partitions`, `extra` is JSON that `load_newest` gives back.
    No save may begin before the one before is committed. What failed, where it cannot begin: a full or lost
    disk on any rank leaves the previous checkpoints as they are, now and in `commit`.
    """
    part = commit.name_part(folder, step=step)
    failed = _on_first(world, lambda: _open_part(part))
    if failed:
        return failed
    description = {
        "step": step,
        "stamp": asdict(metadata),
        "counters": read_counters(engine),
        "extra": dict(extra),
    }
    partitions = list_partitions(engine, masters=masters, averages=averages)
    content = read_content(engine, partitions, rank=world.rank, ranks=world.size)
    if snapshot is not None:
        content = snapshot.take(content)
    path = part / rank_file_name(world.rank)
    return PendingSave(
        part,
        copy.deepcopy(description),
        lambda: write_rank_file(path, content),
        keeping=keeping,
        world=world,
        is_beside=snapshot is not None,
    )


def load_newest(
    engine: Any,
    folder: Path,
    *,
    metadata: CheckpointMetadata,
    masters: Mapping[str, Master],
    averages: Mapping[str, Master],
    changes_allowed: bool,
    world: World,
) -> Loaded | None:
    """Take up the newest checkpoint in `folder` that is whole; None when there is none at all.

    Every file's size and SHA-256 is checked before anything is read from it. Raises ConfigError when a state
    belongs to another kind of run, or when there are states but all are damaged: starting over silently would
    lose them.
    """
    chosen = choose_checkpoint(
        folder,
        remedy="restore one, or start over with --set cmae.checkpoint.resume=never",
        check=lambda path: check_checkpoint(path, world=world),
    )
    if chosen is None:
        return None
    path, description = chosen.path, chosen.description
    notices = [f"warning: {damage}, so an older checkpoint was taken" for damage in chosen.passed_over]
    notices += metadata.compare(description["stamp"], path=path, changes_allowed=changes_allowed)
    _take_up(engine, path, description, masters=masters, averages=averages)
    return Loaded(description["step"], description["extra"], tuple(notices))


def check_checkpoint(path: Path, *, world: World) -> Found:
    """What is wrong with the state at `path`, or None, and its description. Ranks share the hashing."""
    damage, description = check_files(path, rank=world.rank, ranks=world.size)
    return next((found for found in gather_objects(damage) if found), None), description


def _take_up(
    engine: Any,
    path: Path,
    description: dict[str, Any],
    *,
    masters: Mapping[str, Master],
    averages: Mapping[str, Master],
) -> None:
    state = CheckpointReader([path / name for name in sorted(description["files"])])
    parameters = {name: count_elements(parameter) for name, parameter in engine.module.named_parameters()}
    if state.parameters != parameters:
        different = sorted(name for name, _ in set(state.parameters.items()) ^ set(parameters.items()))
        raise ConfigError(
            f"{path} is of another model (it differs in {', '.join(dict.fromkeys(different[:6]))}): "
            "go on with the old settings, or start anew with --out or --set cmae.checkpoint.resume=never"
        )
    write_content(engine, list_partitions(engine, masters=masters, averages=averages), state=state)
    try:
        write_counters(engine, description["counters"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"{path / commit.DESCRIPTION} has counters that cannot be taken up ({error!r}): move its folder "
            "away to go on from an older checkpoint, or start over with --set cmae.checkpoint.resume=never"
        ) from None


def _open_part(part: Path) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    commit.clear_leftovers(part.parent)
    part.mkdir()


def _name_files(entries: Sequence[FileEntry]) -> dict[str, FileEntry]:
    return {rank_file_name(rank): entry for rank, entry in enumerate(entries)}


def _commit(part: Path, description: dict[str, Any], *, keeping: Keeping) -> None:
    commit.write_description(part, description)
    final = commit.commit(part)
    commit.point_latest(final)
    commit.drop_old(final.parent, keep=keeping.newest, keep_every_steps=keeping.every_steps)


def _try(work: Callable[[], Any]) -> tuple[str | None, Any]:
    """What `work` returns, or the first line of why it failed."""
    try:
        return None, work()
    except _SAVE_ERRORS as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, None


def _on_first(world: World, work: Callable[[], Any]) -> str | None:
    """Let the first rank do it. None, or what failed there; every rank gets the same answer."""
    return _join(gather_objects(_try(work)[0] if world.is_first else None))


def _join(failures: Any) -> str | None:
    return "; ".join(dict.fromkeys(failure for failure in failures if failure)) or None
