"""Reading a run file strictly, by path or shipped name: DeepSpeed's keys, one object of ours, overrides."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from cmae_scale.config.batches import MICRO, STEPS, TOTAL, BatchSizes
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.deepspeed_sections import (
    check_autos,
    check_deepspeed,
    drop_lone_zero_,
    drop_unserved,
    fill_autos,
    plan_optimizer,
    prefer_torch_adam_,
)
from cmae_scale.config.precision import leave_to_machine_
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.credentials import list_masked, mask_tree
from cmae_scale.core.errors import ConfigError, nearest
from cmae_scale.core.strict_json import Json, parse_json

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
)  # in config/durations' grammar


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
    """The run that a file describes, after `overrides` such as "cmae.mask.ratio=0.65" (key=JSON value).

    `path` may be the bare name of a shipped file (config/shipped); `kind` is the object that the file must
    have beside DeepSpeed's keys.
    Raises ConfigError with the key and the remedy: missing file, broken JSON, duplicate or unknown keys,
    values outside of their range. "auto" values stay until `resolve_run`; a precision that is not named is
    left to the machine.
    """
    path = find_run_file(path)
    tree = _parse(_read_bytes(path), path)
    for override in overrides:
        _apply_override(tree, override, kind=kind)
    if masked := ", ".join(list_masked(tree)):
        raise ConfigError(
            f"{path}: {masked} held a secret, which no run writes down: give it again (--set KEY=VALUE, or "
            "${NAME} instead of the secret in an address of shards, to have it from the environment)"
        )
    tree.pop("$schema", None)  # for editors
    ours = tree.pop(kind, None)
    if not isinstance(ours, dict):
        raise ConfigError(f'{path}: the object "{kind}" is missing: {_explain_missing(tree, kind)}')
    check_deepspeed(tree, file=str(path), kind=kind, ours=_list_keys(_KINDS[kind]))
    tree = drop_unserved(tree, file=str(path), kind=kind)
    leave_to_machine_(tree)
    settings = _read_settings(ours, path, kind=kind)
    check_autos(tree, settings, file=str(path))
    return Run(path=path, settings=settings, deepspeed=tree)


def resolve_run(run: Run, *, batch: BatchSizes, total_steps: int, warmup_steps: int) -> Run:
    """The same run with every "auto" replaced by its number; running the result's JSON gives the same run.

    A precision that is left to the machine stays so: only the machine can say, see engine/precision.py.
    On one rank, ZeRO 1 and 2 become 0.
    """
    if "optimizer" not in run.deepspeed:
        raise ConfigError(f'{run.path}: "optimizer" is missing: write {{"type": "AdamW", "params": {{...}}}}')
    tree = json.loads(json.dumps(run.deepspeed))
    tree["optimizer"].setdefault("params", {}).setdefault("lr", "auto")
    known = plan_optimizer(
        run.settings, batch_samples=batch.total, total_steps=total_steps, warmup_steps=warmup_steps
    )
    tree = fill_autos(tree, known)
    prefer_torch_adam_(tree)
    if batch.total == batch.local:
        drop_lone_zero_(tree)
    tree[TOTAL], tree[MICRO], tree[STEPS] = batch.total, batch.micro, batch.accumulation
    # DeepSpeed clips at a norm of 1 unless told otherwise (its runtime/constants.py). The official code and
    # MAE clip nowhere
    tree.setdefault("gradient_clipping", 0.0)
    settled = run.settings.model_copy(update={"out": str(run.out)})
    return replace(run, settings=settled, deepspeed=tree)


def dump_run(run: Run) -> str:
    """The run file's text, every default written out, secrets masked: `read_run` asks for those again."""
    ours = json.loads(run.settings.model_dump_json())
    return json.dumps(mask_tree({**run.deepspeed, run.kind: ours}), indent=2) + "\n"


def name_settings(text: str, kind: RunKind) -> str:
    """`text` with the settings that it names as a run of this kind has them.

    Code that serves every kind of run writes "cmae.data.streams"; what only pre-training has stays as it is.
    """
    places = _list_keys(_KINDS[kind])
    return re.sub(
        r"\bcmae\.([a-z_]+(?:\.[a-z_]+)*)",
        lambda found: f"{kind}.{found[1]}" if found[1] in places else found[0],
        text,
    )


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
    key, equals, text = override.partition("=")
    names = key.split(".")
    if names[0] in _KINDS and names[0] != kind:
        raise ConfigError(f'--set "{override}": the settings of this run are "{kind}", as {kind}.data')
    if not equals or not all(names):
        raise ConfigError(f'--set "{override}": write KEY=VALUE, for instance {kind}.seed=1')
    try:
        value = parse_json(text)
    except json.JSONDecodeError:
        value = text
    except ValueError as error:
        raise ConfigError(f'--set "{key}": {error}') from None
    node = tree
    for name in names[:-1]:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f'--set "{override}": {name} is not an object, so it has no setting inside')
        node = child
    node[names[-1]] = value


def _read_settings(tree: Json, path: Path, *, kind: RunKind) -> Settings:
    try:
        return _KINDS[kind].model_validate_json(json.dumps(tree))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{path}: {_describe(first, kind)}{more}") from None


def _describe(error: Mapping[str, Any], kind: RunKind) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join([kind, *location])
    match error["type"]:
        case "extra_forbidden":
            return f'"{key}" is not a setting{_suggest(location, kind)}'
        case "missing":
            return f'"{key}" is missing: write it'
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case "string_pattern_mismatch" | "string_type" if location[-1] in _DURATIONS:
            return f'{key}: {error["input"]!r} is no duration: write "300ep", "5000st", "1.5Msamples" or "2%"'
        case _:
            told = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {error['input']!r}"
            return f"{key}: {told}{_explain(location, kind)}"


def _explain(location: Sequence[str], kind: RunKind) -> str:
    """The first words of a setting's description, in brackets; nothing for what is no setting."""
    section: type[BaseModel] | None = _KINDS[kind]
    text = None
    for name in location:
        field = section.model_fields.get(name) if section else None
        if field is None:
            break
        text, section = field.description, _find_section(field.annotation)
    return f" ({text.split('. ')[0].split('; ')[0].rstrip('.')})" if text else ""


def _find_section(annotation: Any) -> type[BaseModel] | None:
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _suggest(location: list[str], kind: RunKind) -> str:
    keys = _list_keys(_KINDS[kind])
    section, name = ".".join(location[:-1]), location[-1]
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    sibling = nearest(name, [key.rpartition(".")[2] for key in siblings])
    if sibling:
        return sibling
    namesake = next((key for key in keys if key.rpartition(".")[2] == name), None)
    return f"; did you mean '{kind}.{namesake}'?" if namesake else ""


def _list_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted keys of every setting and section below `section`."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if (inner := _find_section(field.annotation)) is not None:
            keys += _list_keys(inner, f"{prefix}{name}.")
    return keys


# beside the package, also where a wheel is installed
SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"


def find_run_file(name: str | Path) -> Path:
    """The file of this name, or else the shipped one: `ds_configs/transfer/knn.json` or `transfer/knn`.

    A name with an ending, as `knn.json`, is never taken for a shipped one: it was to be somebody's own.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED.parent / path if path.parts[:1] == (SHIPPED.name,) else SHIPPED / f"{path}.json"
    return shipped if shipped.is_file() else path
