"""What a checkpoint was written by, and what of that may change when it is taken up again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from cmae_scale.checkpoints.commit import STATE_FORMAT
from cmae_scale.config.run_file import Run, RunKind, dump_run
from cmae_scale.core.credentials import mask_tree
from cmae_scale.core.errors import ConfigError

DataOrder = Mapping[str, int | str] | str  # the samples of every step: counts, and a name of their order

SHOWN = 8  # changed settings

# settings that change where and how fast a run runs, or what it tells, never what it computes
_FREE = ("out", "data.workers", "data.prefetch", "data.cache", "data.cache_gib", "monitor", "checkpoint")

# how a plan of samples differs where neither their number nor that of shards says it
_ORDER = "data.order"


@dataclass(frozen=True)
class CheckpointMetadata:
    """The kind of run, and the run itself. `kind` must stay: with another one it would be another run."""

    kind: dict[str, Any]
    ranks: int
    zero_stage: int
    precision: str
    run: dict[str, Any]  # the resolved run file
    attention: dict[str, str] = field(default_factory=dict)  # see arithmetic.Settled
    format: int = STATE_FORMAT

    def compare(self, written: dict[str, Any], *, path: Path, changes_allowed: bool) -> list[str]:
        """What the user should know who goes on from the state at `path`, whose metadata is `written`.

        Raises ConfigError for a checkpoint of another kind, unless `changes_allowed`.
        """
        if written.get("format") != self.format:
            raise ConfigError(
                f"{path} has format {written.get('format')}, this version writes {self.format}: finish "
                "the run with the version that began it, or start anew with --out"
            )
        written, mine = mask_tree(written), json.loads(json.dumps(asdict(self)))
        broken = list(_differences(written["kind"], _as_written(mine["kind"], written["kind"])))
        if broken and not changes_allowed:
            raise ConfigError(
                f"{path} was written with {_describe_break(broken)}: go on as it was, start anew with --out, "
                "or, if you mean it, --set cmae.checkpoint.resume=anyway"
            )
        notices = []
        for name, label in (("ranks", "ranks"), ("zero_stage", "ZeRO stage"), ("precision", "precision")):
            if written[name] != mine[name]:
                notices.append(f"the checkpoint was written with {label} {written[name]}, now {mine[name]}")
        changed = [
            f"{place} {old} -> {new}"
            for place, old, new in _differences(written["run"], mine["run"])
            if not _is_free(place)
        ]
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            notices.append(f"settings changed since {path.name}: {', '.join(changed[:SHOWN])}{more}")
        return notices


def build_metadata(
    run: Run, *, kind: dict[str, Any], ranks: int, precision: str, attention: dict[str, str]
) -> CheckpointMetadata:
    """The metadata of states that `run`, resolved, writes on `ranks` processes; without its secrets."""
    return CheckpointMetadata(
        kind=mask_tree(kind),
        ranks=ranks,
        zero_stage=run.deepspeed.get("zero_optimization", {}).get("stage", 0),
        precision=precision,
        run=json.loads(dump_run(run)),
        attention=attention,
    )


def _is_free(place: str) -> bool:
    kind, _, inner = place.partition(".")
    return kind in get_args(RunKind) and any(f"{inner}.".startswith(f"{free}.") for free in _FREE)


def _as_written(mine: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """`mine` with samples as states of old describe them: by nothing but the name of their order."""
    if isinstance(written.get("data"), str) and isinstance(mine.get("data"), dict):
        return {**mine, "data": mine["data"]["order"]}
    return mine


def _describe_break(broken: list[tuple[str, Any, Any]]) -> str:
    told = [f"{place} {old} (now {new})" for place, old, new in broken if place not in (_ORDER, "data")]
    return ", ".join(told[:SHOWN]) or "other samples or another order of them: the sizes of shards differ"


def _differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Places where two JSON values differ, with both values; what one of them lacks is None there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            inner = f"{place}.{name}" if place else name
            yield from _differences(old.get(name), new.get(name), inner)
    elif old != new:
        yield place, old, new
