"""One grammar for "how long": "300ep" | "5000st" | "1.5Msamples" | "2%", read into optimizer steps."""

import re
from dataclasses import dataclass, replace

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError

_FORM = re.compile(r"(\d+(?:\.\d+)?)(ep|st|samples|ksamples|Msamples|Gsamples|%)")
_SAMPLES = {"samples": 1, "ksamples": 10**3, "Msamples": 10**6, "Gsamples": 10**9}


@dataclass(frozen=True)
class Clock:
    """What a step means in this run. `total_steps` is what percentages are of; 0 while unknown."""

    steps_per_epoch: int
    batch_samples: int
    total_steps: int = 0


def read_steps(text: str, *, clock: Clock, key: str) -> int:
    """Optimizer steps that `text` lasts, rounded to the nearest whole step.

    `key` is the setting's name for the error message. Raises ConfigError for a text outside of the grammar
    and for a percentage where nothing is known yet that it could be a share of.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f'{key}: "{text}" is no duration: write "300ep", "5000st", "1.5Msamples" or "2%"')
    amount, unit = float(match[1]), match[2]
    if unit == "ep":
        return round(amount * clock.steps_per_epoch)
    if unit == "st":
        return round(amount)
    if unit == "%":
        if not clock.total_steps:
            raise ConfigError(f'{key}: "{text}" is a share of itself: write epochs, steps or samples')
        return round(amount / 100 * clock.total_steps)
    return round(amount * _SAMPLES[unit] / clock.batch_samples)


@dataclass(frozen=True)
class Timetable:
    """The run in optimizer steps. A warm-up longer than the run is cut short by its end."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    save_every_steps: int
    keep_every_steps: int | None = None


def plan_timetable(
    cfg: CmaeConfig | TransferConfig, *, steps_per_epoch: int, batch_samples: int
) -> Timetable:
    """When the run and its warm-up end, how often it saves. Raises ConfigError for less than one step."""
    kind = "cmae" if isinstance(cfg, CmaeConfig) else "transfer"
    clock = Clock(steps_per_epoch=steps_per_epoch, batch_samples=batch_samples)
    total = read_steps(cfg.schedule.duration, clock=clock, key=f"{kind}.schedule.duration")
    if total < 1:
        raise ConfigError(
            f'{kind}.schedule.duration "{cfg.schedule.duration}" is less than a step of '
            f"{batch_samples} images"
        )
    clock = replace(clock, total_steps=total)

    def steps(text: str, key: str) -> int:
        return read_steps(text, clock=clock, key=f"{kind}.{key}")

    kept = cfg.checkpoint.keep_every
    return Timetable(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        warmup_steps=steps(cfg.schedule.warmup, "schedule.warmup"),
        save_every_steps=max(1, steps(cfg.checkpoint.every, "checkpoint.every")),
        keep_every_steps=None if kept is None else max(1, steps(kept, "checkpoint.keep_every")),
    )
