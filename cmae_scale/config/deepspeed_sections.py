"""DeepSpeed's part of a run file: checked before DeepSpeed is loaded, and given a number for every "auto"."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmae_scale.config.batches import MICRO, STEPS, TOTAL
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.deepspeed_keys import ADAM_PARAMS, LOGGED, NESTED, TOP_LEVEL, UNSERVED
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError, nearest

Json = dict[str, Any]

# parameters that choose one of the two, or that only one of them has
_ADAM_CHOICES = {"torch_adam", "bias_correction", "fused", "foreach", "amsgrad", "fp32_optimizer_states"}


class TopLevelValues(BaseModel):
    """Values that DeepSpeed would take unseen; null is its default."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    gradient_clipping: float | None = Field(None, ge=0)  # a negative norm would clip nothing
    gradient_predivide_factor: float | None = Field(None, gt=0)
    prescale_gradients: bool | None = None  # the word "false" would be true
    steps_per_print: int | None = Field(None, ge=1)
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    disable_python_gc: bool | None = None
    zero_allow_untested_optimizer: bool | None = None
    zero_force_ds_cpu_optimizer: bool | None = None


def check_deepspeed(tree: Mapping[str, Any], *, file: str, kind: str, ours: Sequence[str]) -> None:
    """Raise ConfigError for what DeepSpeed would ignore or misread: names, sections without effect, values.

    `kind` is the name of our own object in the file, `ours` are the dotted places in it.
    """
    _check_names(tree, frozenset(TOP_LEVEL) | {kind}, file=file, hint=(kind, ours))
    for name, allowed in TOP_LEVEL.items():
        if allowed is not None and name in tree:
            _check_names(_object(tree, name, file=file), allowed, file=file, prefix=f"{name}.")
    for (section, name), allowed in NESTED.items():
        inner = tree.get(section, {}).get(name)
        if isinstance(inner, dict):
            _check_names(inner, allowed, file=file, prefix=f"{section}.{name}.")
    optimizer = tree.get("optimizer", {})
    if str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        params = _object(optimizer, "params", file=file) if "params" in optimizer else {}
        _check_names(params, ADAM_PARAMS, file=file, prefix="optimizer.params.")
    stage = tree.get("zero_optimization", {}).get("stage", 0)
    if stage != "auto" and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise ConfigError(f"{file}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    _check_values(tree, file=file)


def drop_unserved(tree: Mapping[str, Any], *, file: str, kind: str) -> Json:
    """`tree` without sections that are off and would do nothing here if they were on.

    Raises ConfigError with all of those that are on. (DeepSpeed refuses some even when they are off, and
    measures every message where comms_logger is.)
    """
    present = {name: why for name, why in {**UNSERVED, **LOGGED}.items() if name in tree}
    off = {name for name in present if not _is_on(tree[name])}
    dead = [name for name in present if name not in off and not _is_shown(name, tree)]
    if dead:
        listed = ", ".join(f'"{name}" ({present[name].format(kind=kind)})' for name in dead)
        raise ConfigError(f"{file}: these DeepSpeed settings do nothing here, drop them: {listed}")
    return {name: value for name, value in tree.items() if name not in off}


def prefer_torch_adam_(tree: Json) -> None:
    """Take PyTorch's own fused AdamW where the run file does not choose and nothing is offloaded.

    DeepSpeed's is compiled at the first start, which takes minutes and a compiler.
    """
    optimizer, zero = tree["optimizer"], tree.get("zero_optimization", {})
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    is_offloaded = _is_on(zero.get("cpu_offload")) or "offload_optimizer" in zero
    if is_adam and not is_offloaded and not _ADAM_CHOICES & optimizer["params"].keys():
        optimizer["params"] |= {"torch_adam": True, "fused": True}


def drop_lone_zero_(tree: Json) -> None:
    """Write ZeRO stage 0 for 1 and 2 where one rank has nothing to share: the same sums without the copies.

    Of ViT-S on an H100 that is a sixth of a step. What is offloaded stays as it is, and so do bf16 and fp16
    engines, whose stages keep their weights in other ways.
    """
    zero = tree.get("zero_optimization", {})
    is_offloaded = _is_on(zero.get("cpu_offload")) or "offload_optimizer" in zero
    has_engine = any(tree.get(name, {}).get("enabled", False) for name in ("bf16", "fp16"))
    if zero.get("stage") in (1, 2) and not is_offloaded and not has_engine:
        tree["zero_optimization"] = {**zero, "stage": 0}


def _is_shown(name: str, tree: Mapping[str, Any]) -> bool:
    has_level = str(tree.get("log_level", "")).lower() in ("info", "debug")
    return name in LOGGED and has_level and (name != "comms_logger" or tree[name].get("verbose", False))


def _is_on(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value["enabled"]) if "enabled" in value else any(map(_is_on, value.values()))
    return bool(value) and value != "auto"


def _check_values(tree: Mapping[str, Any], *, file: str) -> None:
    try:
        TopLevelValues.model_validate({name: value for name, value in tree.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        told = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
        raise ConfigError(f"{file}: {first['loc'][0]}: {told}") from None


def _object(tree: Mapping[str, Any], name: str, *, file: str) -> Json:
    value = tree[name]
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {name} must be an object {{...}}, not {value!r}")
    return value


def _check_names(
    tree: Mapping[str, Any],
    allowed: frozenset[str],
    *,
    file: str,
    prefix: str = "",
    hint: tuple[str, Sequence[str]] | None = None,
) -> None:
    for name in tree:
        if name not in allowed:
            raise ConfigError(
                f'{file}: "{prefix}{name}" is not a DeepSpeed setting{nearest(name, allowed)}'
                f"{_elsewhere(name, *hint) if hint else ''}"
            )


def _elsewhere(name: str, kind: str, ours: Sequence[str]) -> str:
    key = next((key for key in ours if key.rsplit(".", 1)[-1] == name), None)
    return f'; "{kind}.{key}" is one of ours' if key else ""


_SIZES = frozenset({TOTAL, MICRO, STEPS})
_SCHEDULED = frozenset(
    {
        "optimizer.params.lr",
        "scheduler.params.warmup_max_lr",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_num_steps",
        "scheduler.params.total_num_steps",
    }
)
_WITH_DEFAULTS = frozenset({"zero_optimization", "fp16", "bf16", "activation_checkpointing", "aio"})
_CHOICES = frozenset({"zero_optimization.stage"})
_OF_THE_MACHINE = "torch_autocast"  # see config/precision.py

# Source: official CMAE config, MAE A.1 (pre-training; fine-tuning; linear probe); eps is PyTorch's
_PRETRAINING = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.05}
_FINETUNING = {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.05}
_PROBING = {"momentum": 0.9, "weight_decay": 0.0}


def check_autos(tree: Mapping[str, Any], settings: CmaeConfig | TransferConfig, *, file: str) -> None:
    """Raise ConfigError with every "auto" of a ds_config that comes to nothing."""
    if isinstance(settings, TransferConfig) and settings.task.knn is not None:
        return  # nothing is trained
    known = _SIZES | _SCHEDULED | _name_recipe(settings).keys()
    found = list(_find_autos(tree))
    wrong = [auto for auto in found if auto not in known and not _has_default(auto)]
    if _SIZES & set(found) and all(tree.get(name, "auto") == "auto" for name in (TOTAL, MICRO)):
        wrong.insert(0, f"{TOTAL} (beside {MICRO})")
    if wrong:
        raise ConfigError(
            f'{file}: nothing in the run says what "auto" should be for {", ".join(wrong)}: write the values'
        )


def fill_autos(tree: Mapping[str, Any], known: Mapping[str, Any]) -> Json:
    """A copy of `tree` with the values of `known` (by key) for "auto", and without the other ones."""
    return _fill(tree, known, prefix="")


def plan_optimizer(
    settings: CmaeConfig | TransferConfig, *, batch_samples: int, total_steps: int, warmup_steps: int
) -> Json:
    """What "auto" comes to for optimizer and scheduler, by key.

    `lr` follows the linear scaling rule base_lr * train_batch_size / 256 (Source: MAE appendix A.1, official
    config), the rest of the optimizer the published recipe, and the scheduler the run's own schedule.
    """
    peak = settings.schedule.base_lr * batch_samples / 256
    return {
        "optimizer.params.lr": peak,
        "scheduler.params.warmup_max_lr": peak,
        "scheduler.params.warmup_min_lr": peak * settings.schedule.warmup_start,
        "scheduler.params.warmup_num_steps": warmup_steps,
        "scheduler.params.total_num_steps": total_steps,
        **_name_recipe(settings),
    }


def _name_recipe(settings: CmaeConfig | TransferConfig) -> Json:
    recipe: Json = _PRETRAINING
    if isinstance(settings, TransferConfig):
        recipe = _PROBING if settings.task.linear is not None else _FINETUNING
    return {f"optimizer.params.{name}": value for name, value in recipe.items()}


def _has_default(key: str) -> bool:
    section, *inner = key.split(".")
    if section == _OF_THE_MACHINE or not inner:
        return True
    return len(inner) == 1 and section in _WITH_DEFAULTS and key not in _CHOICES


def _find_autos(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if value == "auto":
            yield f"{prefix}{name}"
        elif isinstance(value, dict):
            yield from _find_autos(value, f"{prefix}{name}.")


def _fill(tree: Mapping[str, Any], known: Mapping[str, Any], *, prefix: str) -> Json:
    filled: Json = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key == _OF_THE_MACHINE:
            filled[name] = value
        elif isinstance(value, dict):
            filled[name] = _fill(value, known, prefix=f"{key}.")
        elif value != "auto":
            filled[name] = value
        elif key in known:
            filled[name] = known[key]
    return filled
