"""Sentences about metrics that look like a collapse: advice, never a stop, for good runs show some of it."""

from collections import deque
from collections.abc import Mapping

_LINES = 5  # log lines over which a sign must hold
_NEAR_CHANCE = 0.98  # of ln K
_NARROW = 0.1  # spread of queries or keys; 1 is evenly spread
_RISE = 1.1  # times the lowest mean so far. Source: ZhichengHuang/CMAE issue 16, a rise late in a good run


class CollapseWarnings:
    """Hears every log line and speaks up once about each sign, until the sign has gone."""

    def __init__(self, *, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._lines: deque[Mapping[str, float | int | None]] = deque(maxlen=_LINES)
        self._lowest: float | None = None
        self._told: set[str] = set()

    def hear(self, metrics: Mapping[str, float | int | None]) -> list[str]:
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
