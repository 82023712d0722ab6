"""What a training state was written by: under another value, resuming would fail or be another run."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmae_scale.core.config import Run
from cmae_scale.core.errors import ConfigError

STATE_FORMAT = 1


@dataclass(frozen=True)
class Stamp:
    """The kind of run. Two states with equal stamps continue one another."""

    ranks: int
    zero_stage: int
    precision: str
    train_batch_size: int
    seed: int
    data: str  # fingerprint of the sample order
    model: dict[str, Any]
    format: int = STATE_FORMAT

    def check(self, written: dict[str, Any], *, path: Path, step: int) -> None:
        """Raise ConfigError unless the state at `path`, whose stamp is `written`, is of this kind."""
        for name, value in json.loads(json.dumps(asdict(self))).items():
            if written.get(name) != value:
                raise ConfigError(
                    f"{path} (step {step}) was written with {name} {_brief(written.get(name), value)}, "
                    f"this run has {_brief(value, written.get(name))}: go on with the old value, or start "
                    "anew with --out or --set cmae.checkpoint.resume=never"
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
