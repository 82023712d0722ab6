"""How long a run is, in optimizer steps, and what changes on the way: learning rate and target momentum.

One grammar says "how long": "300ep" | "5000st" | "1.5Msamples" | "2%".
"""

import math
import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.transfer import TransferConfig, TransferScheduleConfig
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


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from `warmup_start` times the peak, then half a cosine down to `min_lr`, per step.

    Source: official CMAE config (warm-up from 1e-4 of the peak over 40 epochs, cosine to 0 over the rest).
    Differs: the peak comes at step `warmup_steps`, as MAE's; mmengine has it one step earlier.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    warmup_start: float = 1e-4
    min_lr: float = 0.0
    scales_min_lr: bool = False  # whether a group's scale is of its end too (MAE), or of its peak alone

    def at(self, step: int, *, scale: float = 1.0) -> float:
        """Learning rate of the update that step `step` (from 0) makes, for a group with this scale."""
        peak, low = self.peak * scale, self.min_lr * (scale if self.scales_min_lr else 1.0)
        if step < self.warmup_steps:
            share = self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
            return peak * share
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class TargetMomentum:
    """Share of the old target that an update keeps: `base` all along, or rising to 1 on half a cosine.

    Source: paper 3.3 (constant 0.996); the cosine is BYOL's (arXiv:2006.07733, section 3.2).
    """

    base: float
    total_steps: int
    is_cosine: bool = False

    def at(self, step: int) -> float:
        """Momentum of the update after optimizer step `step` (from 0)."""
        if not self.is_cosine:
            return self.base
        return 1 - (1 - self.base) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.total_steps))))


class Schedules(NamedTuple):
    """What changes from step to step."""

    lr: WarmupCosine
    momentum: TargetMomentum


def plan_schedules(cfg: CmaeConfig, *, peak_lr: float, times: Timetable) -> Schedules:
    """The schedules of a run file over its timetable."""
    return Schedules(
        lr=WarmupCosine(
            peak=peak_lr,
            total_steps=times.total_steps,
            warmup_steps=times.warmup_steps,
            warmup_start=cfg.schedule.warmup_start,
            min_lr=cfg.schedule.min_lr,
        ),
        momentum=TargetMomentum(
            base=cfg.target.momentum,
            total_steps=times.total_steps,
            is_cosine=cfg.target.momentum_schedule == "cosine",
        ),
    )


def plan_transfer_lr(cfg: TransferScheduleConfig, *, peak_lr: float, times: Timetable) -> WarmupCosine:
    """The learning rate of a run that starts from an encoder."""
    return WarmupCosine(
        peak=peak_lr,
        total_steps=times.total_steps,
        warmup_steps=times.warmup_steps,
        warmup_start=cfg.warmup_start,
        min_lr=cfg.min_lr,
        scales_min_lr=cfg.min_lr_rule == "scaled",
    )
