"""Training states on disk: a folder is committed by a rename, or it does not exist.

checkpoints/
  step_00000500/        DeepSpeed's own files (one per rank and kind) and state.json, our description
  latest                name of the newest, for DeepSpeed's tools; this module trusts the folders alone
  step_00001000.part/   left by an interrupted save: never read, removed by the next save
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmae_scale.core.collectives import barrier
from cmae_scale.core.config import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, sync, sync_tree, write_text

_COMMITTED = re.compile(r"step_(\d{8,})")
STATE_FORMAT = 1


@dataclass(frozen=True)
class Stamp:
    """What a state was written by: resuming under another value would fail or quietly be another run."""

    ranks: int
    zero_stage: int
    precision: str
    train_batch_size: int
    seed: int
    data: str  # fingerprint of the sample order
    model: dict[str, Any]
    format: int = STATE_FORMAT


def find_newest(folder: Path) -> Path | None:
    """The committed state with the highest step, or None. Half-written ones have another name."""
    if not folder.is_dir():
        return None
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _COMMITTED.fullmatch(path.name))}
    return steps[max(steps)] if steps else None


def save_state(
    engine: Any, folder: Path, *, step: int, stamp: Stamp, target_masters: dict[str, Tensor] | None, keep: int
) -> Path:
    """Write the state after `step` optimizer steps and drop all but the newest `keep`; all ranks call it.

    Ranks write into a ".part" folder; only when all are done does the first rank sync it to disk, rename it
    and point `latest` to it. So at every moment the previous state or the new one is whole.
    """
    is_first = torch.distributed.get_rank() == 0
    name = f"step_{step:08d}"
    part = folder / (name + PART)
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"*{PART}"):
            shutil.rmtree(leftover)
    barrier()
    engine.save_checkpoint(
        str(folder),
        tag=part.name,
        client_state={"step": step, "target_masters": target_masters},
        save_latest=False,
    )
    barrier()
    if is_first:
        write_text(part / "state.json", json.dumps({"step": step, **asdict(stamp)}, indent=2) + "\n")
        sync_tree(part)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        part.rename(folder / name)
        sync(folder)
        write_text(folder / "latest", name)
        _drop_old(folder, keep=keep)
    barrier()
    return folder / name


def load_state(engine: Any, path: Path, *, stamp: Stamp) -> tuple[int, dict[str, Tensor] | None]:
    """Optimizer steps done, and this rank's fp32 masters of the target, after loading all else into `engine`.

    Raises ConfigError when the state belongs to another kind of run or its description is damaged.
    """
    check_stamp(path, stamp=stamp)
    loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise ConfigError(f"{path} holds no training state: remove it, or start anew with --out")
    return int(client["step"]), client["target_masters"]


def check_stamp(path: Path, *, stamp: Stamp) -> None:
    """Raise ConfigError unless the state at `path` was written by a run like this one."""
    try:
        written = json.loads((path / "state.json").read_text())
        step = int(written.pop("step"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}/state.json is damaged ({error}): remove that folder to use an older state"
        ) from None
    now = json.loads(json.dumps(asdict(stamp)))
    for name, value in now.items():
        if written.get(name) != value:
            raise ConfigError(
                f"{path} (step {step}) was written with {name} {_brief(written.get(name), value)}, "
                f"this run has {_brief(value, written.get(name))}: go on with the old value, or start anew "
                "with --out or --set cmae.checkpoint.resume=never"
            )


def build_stamp(run: Run, *, ranks: int, precision: str, data: str) -> Stamp:
    """The stamp of states that `run` writes on `ranks` processes."""
    cmae = json.loads(run.cmae.model_dump_json(include={"model", "mask", "heads", "views", "loss", "target"}))
    for free in ("attention", "remat"):  # change speed and memory, not the model
        del cmae["model"][free]
    return Stamp(
        ranks=ranks,
        zero_stage=run.deepspeed.get("zero_optimization", {}).get("stage", 0),
        precision=precision,
        train_batch_size=run.deepspeed["train_batch_size"],
        seed=run.cmae.seed,
        data=data,
        model=cmae,
    )


def _brief(value: Any, other: Any) -> str:
    """The part of `value` that differs from `other`."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name in value:
            if value[name] != other.get(name):
                return f"{name} {_brief(value[name], other.get(name))}"
    return str(value)


def _drop_old(folder: Path, *, keep: int) -> None:
    committed = sorted(path for path in folder.iterdir() if _COMMITTED.fullmatch(path.name))
    for path in committed[:-keep]:
        shutil.rmtree(path)
