"""How the loss has been lately, to tell a spike from it: on the device, and on disk beside the states."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.files import write_text

_TRENDS = TypeAdapter(dict[int, tuple[float, float, float]])  # by step
KEPT = 8  # steps whose trends stay on disk: more than states are usually kept


@dataclass(frozen=True)
class Trend:
    """Running mean and variance of the losses of applied steps, on the device: asking waits for nothing."""

    WARM_STEPS = 20  # before so many, nothing is a spike
    MEMORY = 0.99  # weight of the past: about 100 steps

    values: Float[Tensor, "3"]  # number of losses, mean, variance

    def is_spike(self, loss: Float[Tensor, ""], *, deviations: float) -> Tensor:
        """Whether `loss` is more than so many standard deviations above the mean."""
        count, mean, variance = self.values
        # a floor under the deviation: of losses that hardly move, every move would be a spike
        limit = mean + deviations * variance.sqrt().clamp(min=1e-3 * mean.abs())
        spike: Tensor = (count >= self.WARM_STEPS) & (loss.double() > limit)
        return spike

    def add_(self, loss: Float[Tensor, ""]) -> None:
        """Follow `loss`. Young averages are plain ones, so that the first loss does not weigh too much."""
        count, mean, variance = self.values
        share = torch.clamp(1 / (count + 1), min=1 - self.MEMORY)
        away = loss.double() - mean
        new_mean = mean + share * away
        new_variance = (1 - share) * (variance + share * away * away)
        self.values.copy_(torch.stack([count + 1, new_mean, new_variance]))


class TrendFile:
    """RUN/loss_trend.json: the trend at each of the last saves. A resumed run finds the same spikes."""

    def __init__(self, path: Path, *, is_first: bool) -> None:
        self._path = path
        self._is_first = is_first

    def save(self, trend: Trend, *, step: int) -> None:
        """Keep the trend after `step` steps. Written before the state, so that every state has its trend."""
        if self._is_first:
            known = {**self._read(), step: tuple(trend.values.tolist())}
            newest = sorted(known)[-KEPT:]
            with suppress(OSError):  # a full disk: the state that follows says so
                write_text(self._path, json.dumps({name: known[name] for name in newest}) + "\n")

    def load_(self, trend: Trend, *, step: int) -> None:
        """Set `trend` to what it was after `step` steps; a new one where nothing is known."""
        values = gather_objects(self._read().get(step, (0.0,) * 3) if self._is_first else None)[0]
        trend.values.copy_(torch.tensor(values, dtype=torch.float64))

    def _read(self) -> dict[int, tuple[float, float, float]]:
        try:
            return _TRENDS.validate_json(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
