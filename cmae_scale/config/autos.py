"""Where "auto" may stand in a ds_config, and what it comes to.

A number of its own where it follows from the rest of the run; else, where DeepSpeed or this project has a
default, what leaving it out would give. Names and choices (a type, a device, a path) are nobody's to guess.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cmae_scale.config.batches import MICRO, STEPS, TOTAL
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError

Json = dict[str, Any]

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


def check_autos(tree: Mapping[str, Any], settings: CmaeConfig | TransferConfig, *, place: str) -> None:
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
            f'{place}: nothing in the run says what "auto" should be for {", ".join(wrong)}: write the values'
        )


def fill_autos(tree: Mapping[str, Any], known: Mapping[str, Any]) -> Json:
    """A copy of `tree` with the values of `known` (by place) for "auto", and without the other ones."""
    return _fill(tree, known, prefix="")


def plan_optimizer(
    settings: CmaeConfig | TransferConfig, *, batch_samples: int, total_steps: int, warmup_steps: int
) -> Json:
    """What "auto" comes to for optimizer and scheduler, by place.

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


def _has_default(place: str) -> bool:
    section, *inner = place.split(".")
    if section == _OF_THE_MACHINE or not inner:
        return True
    return len(inner) == 1 and section in _WITH_DEFAULTS and place not in _CHOICES


def _find_autos(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if value == "auto":
            yield f"{prefix}{name}"
        elif isinstance(value, dict):
            yield from _find_autos(value, f"{prefix}{name}.")


def _fill(tree: Mapping[str, Any], known: Mapping[str, Any], *, prefix: str) -> Json:
    filled: Json = {}
    for name, value in tree.items():
        place = f"{prefix}{name}"
        if place == _OF_THE_MACHINE:
            filled[name] = value
        elif isinstance(value, dict):
            filled[name] = _fill(value, known, prefix=f"{place}.")
        elif value != "auto":
            filled[name] = value
        elif place in known:
            filled[name] = known[place]
    return filled
