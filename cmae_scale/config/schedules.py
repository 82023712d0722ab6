"""Learning rate and target momentum as pure functions of the optimizer step."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.durations import Timetable
from cmae_scale.config.transfer import TransferScheduleConfig


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
