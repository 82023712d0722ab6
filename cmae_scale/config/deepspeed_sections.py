"""DeepSpeed's part of a run file, checked before DeepSpeed is loaded: it takes many a mistake in silence."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmae_scale.config.deepspeed_keys import ADAM_PARAMS, LOGGED, NESTED, TOP_LEVEL, UNSERVED
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


def check_deepspeed(tree: Mapping[str, Any], *, place: str, kind: str, ours: Sequence[str]) -> None:
    """Raise ConfigError for what DeepSpeed would ignore or misread: names, sections without effect, values.

    `kind` is the name of our own object in the file, `ours` are the dotted places in it.
    """
    _check_names(tree, frozenset(TOP_LEVEL) | {kind}, place=place, hint=(kind, ours))
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
    if stage != "auto" and (isinstance(stage, bool) or stage not in (0, 1, 2, 3)):
        raise ConfigError(f"{place}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")
    _check_values(tree, place=place)


def drop_unserved(tree: Mapping[str, Any], *, place: str, kind: str) -> Json:
    """`tree` without sections that are off and would do nothing here if they were on.

    Raises ConfigError with all of those that are on. (DeepSpeed refuses some even when they are off, and
    measures every message where comms_logger is.)
    """
    present = {name: why for name, why in {**UNSERVED, **LOGGED}.items() if name in tree}
    off = {name for name in present if not _is_on(tree[name])}
    dead = [name for name in present if name not in off and not _is_shown(name, tree)]
    if dead:
        listed = ", ".join(f'"{name}" ({present[name].format(kind=kind)})' for name in dead)
        raise ConfigError(f"{place}: these DeepSpeed settings do nothing here, drop them: {listed}")
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


def _is_shown(name: str, tree: Mapping[str, Any]) -> bool:
    has_level = str(tree.get("log_level", "")).lower() in ("info", "debug")
    return name in LOGGED and has_level and (name != "comms_logger" or tree[name].get("verbose", False))


def _is_on(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value["enabled"]) if "enabled" in value else any(map(_is_on, value.values()))
    return bool(value) and value != "auto"


def _check_values(tree: Mapping[str, Any], *, place: str) -> None:
    try:
        TopLevelValues.model_validate({name: value for name, value in tree.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        told = f"{first['msg'][0].lower()}{first['msg'][1:]}, not {first['input']!r}"
        raise ConfigError(f"{place}: {first['loc'][0]}: {told}") from None


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
    prefix: str = "",
    hint: tuple[str, Sequence[str]] | None = None,
) -> None:
    for name in tree:
        if name not in allowed:
            raise ConfigError(
                f'{place}: "{prefix}{name}" is not a DeepSpeed setting{nearest(name, allowed)}'
                f"{_elsewhere(name, *hint) if hint else ''}"
            )


def _elsewhere(name: str, kind: str, ours: Sequence[str]) -> str:
    place = next((place for place in ours if place.rsplit(".", 1)[-1] == name), None)
    return f'; "{kind}.{place}" is one of ours' if place else ""
