"""Whether the network learns: gradient norms of its parts, and warnings of a collapse before the end."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.core.collectives import gather_rows
from cmae_scale.engine.zero.partitions import measure_gradients


class Health:
    """What is looked at in the last step before each log line. All ranks look together.

    `is_due` says that this step is such a one; in all others nothing is measured. `parts` are all trained
    parameters under the names they are told by; `distance` measures how far the target is from what it
    follows, `chance` is the contrast loss of blind guessing, if there are such.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Parameter]],
        *,
        distance: Callable[[], Tensor] | None,
        chance: float | None,
    ) -> None:
        self.is_due = False
        self._parts = {name: part for name, part in parts.items() if part}
        self._distance = distance
        self._chance = chance
        self._gradients: Tensor | None = None
        self._spreads: dict[str, Tensor] = {}

    def look_at_features(self, queries: Float[Tensor, "local dim"], keys: Float[Tensor, "total dim"]) -> None:
        """This rank's queries and the keys of the whole batch, at a step that is due; all ranks together."""
        self._spreads = {
            "query_spread": measure_spread(gather_rows(queries)),
            "key_spread": measure_spread(keys),
        }

    def look_at_gradients(self, engine: Any) -> None:
        """The gradients of a whole step that is due, before the update; all ranks together."""
        self._gradients = measure_gradients(engine, self._parts)

    def read(self, *, contrast: float | None) -> dict[str, float]:
        """What was seen, for a log line, and `contrast` as a share of chance. Empty where nothing was due."""
        figures = (
            {} if contrast is None or not self._chance else {"contrast_vs_chance": contrast / self._chance}
        )
        if self._gradients is not None:
            norms = self._gradients.tolist()
            figures |= {f"grad_norm_{name}": norm for name, norm in zip(self._parts, norms, strict=True)}
            figures["grad_norm"] = float(self._gradients.square().sum().sqrt())
            if self._distance is not None:
                figures["target_distance"] = float(self._distance())
        figures |= {name: float(spread) for name, spread in self._spreads.items()}
        self._gradients, self._spreads = None, {}
        return figures


@torch.no_grad()
def measure_spread(vectors: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """How far vectors of different images point apart: 1 = evenly all around, 0 = all the same way.

    Mean standard deviation of the dimensions of the L2-normalised vectors, times the square root of their
    number, with which it is 1 for a sphere evenly filled. Source: SimSiam (arXiv:2011.10566) section 4.1.
    """
    directions = F.normalize(vectors.float(), dim=1)
    spread: Tensor = directions.std(dim=0, unbiased=False).mean() * math.sqrt(directions.shape[1])
    return spread


_LINES = 5  # log lines over which a sign must hold
_NEAR_CHANCE = 0.98  # of ln K
_NARROW = 0.1  # spread of queries or keys; 1 is evenly spread
_RISE = 1.1  # times the lowest mean so far. Source: ZhichengHuang/CMAE issue 16, a rise late in a good run


class CollapseWarnings:
    """Checks every log line and warns once of each sign of a collapse, until the sign has gone."""

    def __init__(self, *, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._lines: deque[Mapping[str, float | int | None]] = deque(maxlen=_LINES)
        self._lowest: float | None = None
        self._told: set[str] = set()

    def check(self, metrics: Mapping[str, float | int | None]) -> list[str]:
        """What to say after this line."""
        if (metrics["step"] or 0) <= self._warmup_steps:
            return []
        self._lines.append(metrics)
        if len(self._lines) < _LINES:
            return []
        signs = self._signs()
        new = [text for sign, text in signs.items() if sign not in self._told]
        self._told = set(signs)
        return new

    def _signs(self) -> dict[str, str]:
        signs = {}
        chance = self._mean("contrast_vs_chance")
        if chance is not None and chance > _NEAR_CHANCE:
            signs["chance"] = (
                f"advice: the contrast loss is {chance:.1%} of blind guessing: the branches do not find each "
                "other yet. If it stays so: lower cmae.schedule.base_lr, or a longer warm-up"
            )
        for name, what in (("query_spread", "queries"), ("key_spread", "keys")):
            spread = self._mean(name)
            if spread is not None and spread < _NARROW:
                signs[name] = (
                    f"advice: the {what} of different images are nearly the same ({name} {spread:.3f}; 1 is "
                    "evenly spread, 0 a collapse). Lower cmae.schedule.base_lr, or use a shallower "
                    "cmae.model.feature_decoder, or a momentum nearer to 1"
                )
        return signs | self._rise()

    def _rise(self) -> dict[str, str]:
        contrast = self._mean("contrast")
        if contrast is None or not contrast > 0:
            return {}
        self._lowest = contrast if self._lowest is None else min(self._lowest, contrast)
        if contrast <= _RISE * self._lowest:
            return {}
        return {
            "rise": f"advice: the contrast loss rises: {contrast:.4f} after {self._lowest:.4f} at its "
            "lowest. Late in a long run with a large batch this is harmless; with a small batch or a falling "
            "query_spread lower cmae.schedule.base_lr"
        }

    def _mean(self, name: str) -> float | None:
        values = [value for line in self._lines if (value := line.get(name)) is not None]
        return sum(values) / len(values) if values else None
