"""Reading a run file strictly: DeepSpeed's own keys plus one object of ours, and overrides on top."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from cmae_scale.core.batches import MICRO, STEPS, TOTAL, BatchSizes
from cmae_scale.core.deepspeed_keys import ADAM_PARAMS, NESTED, TOP_LEVEL
from cmae_scale.core.errors import ConfigError, nearest
from cmae_scale.core.settings import CmaeConfig
from cmae_scale.core.shipped import SHIPPED, find_run_file
from cmae_scale.core.strict_json import Json, parse_json
from cmae_scale.core.transfer_settings import TransferConfig

Settings = CmaeConfig | TransferConfig
RunKind = Literal["cmae", "transfer"]  # the name of our object in a run file

_KINDS: dict[RunKind, type[CmaeConfig] | type[TransferConfig]] = {
    "cmae": CmaeConfig,
    "transfer": TransferConfig,
}
_COMMANDS = {"cmae": "pretrain", "transfer": "transfer"}
_LEAST = {"cmae": '"model" and "data"', "transfer": '"encoder", "task" and "data"'}
_DURATIONS = frozenset(
    {"duration", "warmup", "every", "keep_every", "evaluate_every"}
)  # in core/durations' grammar


@dataclass(frozen=True)
class Run:
    """One run: `settings` are ours, `deepspeed` what deepspeed.initialize gets, `path` is the file."""

    path: Path
    settings: Settings
    deepspeed: Json

    @property
    def cmae(self) -> CmaeConfig:
        """The settings of a pre-training run."""
        assert isinstance(self.settings, CmaeConfig)
        return self.settings

    @property
    def transfer(self) -> TransferConfig:
        """The settings of a run that starts from an encoder."""
        assert isinstance(self.settings, TransferConfig)
        return self.settings

    @property
    def kind(self) -> RunKind:
        """The name of our object in the file."""
        return "cmae" if isinstance(self.settings, CmaeConfig) else "transfer"

    @property
    def out(self) -> Path:
        """The run folder: the setting out, or runs/<name of the run file>."""
        return Path(self.settings.out or f"runs/{self.path.stem}")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up, once resolved."""
        return float(self.deepspeed["optimizer"]["params"]["lr"])


def read_run(path: str | Path, overrides: Sequence[str] = (), *, kind: RunKind = "cmae") -> Run:
    """The run that a file describes, after `overrides` such as "cmae.mask.ratio=0.65" (place=JSON value).

    `path` may be the bare name of a shipped file (core/shipped); `kind` is the object that the file must have
    beside DeepSpeed's keys.
    Raises ConfigError with the place and the remedy: missing file, broken JSON, duplicate or unknown keys,
    values outside of their range. "auto" values stay until `resolve_run`.
    """
    path = find_run_file(path)
    tree = _parse(_read_bytes(path), path)
    for override in overrides:
        _apply_override(tree, override, kind=kind)
    ours = tree.pop(kind, None)
    if not isinstance(ours, dict):
        raise ConfigError(f'{path}: the object "{kind}" is missing: {_explain_missing(tree, kind)}')
    check_deepspeed_keys(tree, place=str(path), kind=kind)
    return Run(path=path, settings=_read_settings(ours, path, kind=kind), deepspeed=tree)


def resolve_run(run: Run, *, batch: BatchSizes, total_steps: int, warmup_steps: int) -> Run:
    """The same run with every "auto" replaced by its number; running the result's JSON gives the same run.

    `lr` follows the linear scaling rule base_lr * train_batch_size / 256 (Source: MAE appendix A.1, official
    config); scheduler totals follow the schedule; "auto" sizes of zero_optimization are left to DeepSpeed.
    """
    tree = json.loads(json.dumps(run.deepspeed))
    tree[TOTAL], tree[MICRO], tree[STEPS] = batch.total, batch.micro, batch.accumulation
    # DeepSpeed clips at a norm of 1 unless told otherwise (its runtime/constants.py). The official code and
    # MAE clip nowhere
    tree.setdefault("gradient_clipping", 0.0)
    if "optimizer" not in tree:
        raise ConfigError(f'{run.path}: "optimizer" is missing: write {{"type": "AdamW", "params": {{...}}}}')
    tree["optimizer"].setdefault("params", {}).setdefault("lr", "auto")
    peak = run.settings.schedule.base_lr * batch.total / 256
    known = {
        ("optimizer", "lr"): peak,
        ("scheduler", "warmup_max_lr"): peak,
        ("scheduler", "warmup_min_lr"): peak * run.settings.schedule.warmup_start,
        ("scheduler", "warmup_num_steps"): warmup_steps,
        ("scheduler", "total_num_steps"): total_steps,
    }
    for (section, name), value in known.items():
        params = tree.get(section, {}).get("params", {})
        if params.get(name) == "auto":
            params[name] = value
    zero = tree.get("zero_optimization", {})
    for name in [name for name, value in zero.items() if value == "auto" and name != "stage"]:
        del zero[name]
    if left := _find_auto(tree):
        raise ConfigError(
            f'{run.path}: "{left}" cannot be "auto": nothing else in the run says what it should be'
        )
    settled = run.settings.model_copy(update={"out": str(run.out)})
    return replace(run, settings=settled, deepspeed=tree)


def dump_run(run: Run) -> str:
    """The run file's text, every default written out."""
    ours = json.loads(run.settings.model_dump_json())
    return json.dumps({**run.deepspeed, run.kind: ours}, indent=2) + "\n"


def check_deepspeed_keys(tree: Mapping[str, Any], *, place: str, kind: RunKind = "cmae") -> None:
    """Raise ConfigError for a name DeepSpeed does not know, with the nearest one it does."""
    _check_names(tree, frozenset(TOP_LEVEL) | {kind}, place=place, prefix="", kind=kind)
    for name, allowed in TOP_LEVEL.items():
        if allowed is not None and name in tree:
            _check_names(_object(tree, name, place=place), allowed, place=place, prefix=f"{name}.")
    for (section, name), allowed in NESTED.items():
        inner = tree.get(section, {}).get(name)
        if isinstance(inner, dict):
            _check_names(inner, allowed, place=place, prefix=f"{section}.{name}.")
    optimizer = tree.get("optimizer", {})
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        params = _object(optimizer, "params", place=place) if "params" in optimizer else {}
        _check_names(params, ADAM_PARAMS, place=place, prefix="optimizer.params.")
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{place}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        siblings = path.parent.glob("*.json") if path.parent.is_dir() else []
        hint = nearest(path.name, [sibling.name for sibling in siblings])
        raise ConfigError(f"run file {path} does not exist{hint or f'; the shipped ones are in {SHIPPED}'}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"run file {path} cannot be read: {error}") from None


def _parse(content: bytes, path: Path) -> Json:
    try:
        tree = parse_json(content)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a run file is one JSON object, not a {type(tree).__name__}")
    return tree


def _explain_missing(tree: Mapping[str, Any], kind: RunKind) -> str:
    other = next((name for name in _KINDS if name in tree), None)
    if other is not None:
        return f'it has "{other}", so start it with cmae_scale/{_COMMANDS[other]}.py'
    return f"write at least its {_LEAST[kind]}"


def _apply_override(tree: Json, override: str, *, kind: RunKind) -> None:
    place, equals, text = override.partition("=")
    names = place.split(".")
    if names[0] in _KINDS and names[0] != kind:
        raise ConfigError(f'--set "{override}": the settings of this run are "{kind}", as {kind}.data')
    if not equals or not all(names):
        raise ConfigError(f'--set "{override}": write PLACE=VALUE, for instance cmae.mask.ratio=0.65')
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        value = text
    except ValueError as error:
        raise ConfigError(f'--set "{place}": {error}') from None
    node = tree
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f'--set "{override}": {name} is not an object, so it has no setting inside')
        node = child
    node[names[-1]] = value


def _object(tree: Mapping[str, Any], name: str, *, place: str) -> Json:
    value = tree[name]
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: {name} must be an object {{...}}, not {value!r}")
    return value


def _check_names(
    tree: Mapping[str, Any],
    allowed: frozenset[str],
    *,
    place: str,
    prefix: str,
    kind: RunKind = "cmae",
) -> None:
    for name in tree:
        if name not in allowed:
            known = f"{prefix}{name}" if not prefix else name
            raise ConfigError(
                f'{place}: "{prefix}{name}" is not a DeepSpeed setting{nearest(known, allowed)}'
                f"{_elsewhere(name, kind) if not prefix else ''}"
            )


def _elsewhere(name: str, kind: RunKind) -> str:
    place = next((place for place in _places(_KINDS[kind]) if place.rsplit(".", 1)[-1] == name), None)
    return f'; "{kind}.{place}" is one of ours' if place else ""


def _read_settings(tree: Json, path: Path, *, kind: RunKind) -> Settings:
    try:
        return _KINDS[kind].model_validate_json(json.dumps(tree))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{path}: {_describe(first, kind)}{more}") from None


def _describe(error: Mapping[str, Any], kind: RunKind) -> str:
    location = [str(part) for part in error["loc"]]
    place = ".".join([kind, *location])
    match error["type"]:
        case "extra_forbidden":
            return f'"{place}" is not a setting{_suggest(location, kind)}'
        case "missing":
            return f'"{place}" is missing: write it'
        case "value_error":
            return f"{place}: {error['ctx']['error']}"
        case "string_pattern_mismatch" | "string_type" if location[-1] in _DURATIONS:
            return (
                f'{place}: {error["input"]!r} is no duration: write "300ep", "5000st", "1.5Msamples" or "2%"'
            )
        case _:
            return f"{place}: {error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"


def _suggest(location: list[str], kind: RunKind) -> str:
    places = _places(_KINDS[kind])
    section, name = ".".join(location[:-1]), location[-1]
    siblings = [place for place in places if place.rpartition(".")[0] == section]
    sibling = nearest(name, [place.rpartition(".")[2] for place in siblings])
    if sibling:
        return sibling
    namesake = next((place for place in places if place.rpartition(".")[2] == name), None)
    return f"; did you mean '{kind}.{namesake}'?" if namesake else ""


def _places(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted places of every setting and section below `section`."""
    places = []
    for name, field in section.model_fields.items():
        places.append(f"{prefix}{name}")
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                places += _places(kind, f"{prefix}{name}.")
    return places


def _find_auto(tree: Any, prefix: str = "") -> str | None:
    if tree == "auto":
        return prefix
    if isinstance(tree, dict):
        for name, value in tree.items():
            if found := _find_auto(value, f"{prefix}.{name}" if prefix else name):
                return found
    return None
