"""The batch equation: batch size = micro-batch size per GPU * gradient accumulation steps * ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cmae_scale.core.errors import ConfigError

TOTAL, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True)
class BatchSizes:
    """Images per optimizer step (`total`), images per pass of one rank (`micro`), passes per step."""

    total: int
    micro: int
    accumulation: int

    @property
    def local(self) -> int:
        """Images per optimizer step of one rank."""
        return self.micro * self.accumulation


def plan_batch(deepspeed: Mapping[str, Any], *, ranks: int) -> BatchSizes:
    """The three sizes on `ranks` processes; what is "auto" or missing follows from the rest.

    With only train_batch_size given, the whole share of a rank is one micro-batch. Raises ConfigError when
    they do not multiply.
    """
    total, micro, steps = (_read_size(deepspeed, name) for name in (TOTAL, MICRO, STEPS))
    if total is None and micro is None:
        raise ConfigError(f'"{TOTAL}" or "{MICRO}" must be a number: write for instance "{TOTAL}": 256')
    if total is None:
        assert micro is not None
        steps = steps or 1
        return BatchSizes(total=micro * steps * ranks, micro=micro, accumulation=steps)
    if micro is None:
        steps = steps or 1
        micro = total // (steps * ranks)
    elif steps is None:
        steps = total // (micro * ranks)
    if micro * steps * ranks != total or 0 in (micro, steps):
        raise ConfigError(_explain(total, micro=micro, steps=steps, ranks=ranks))
    return BatchSizes(total=total, micro=micro, accumulation=steps)


def _read_size(deepspeed: Mapping[str, Any], name: str) -> int | None:
    value = deepspeed.get(name, "auto")
    if value in ("auto", None):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f'"{name}" must be a whole number of at least 1 or "auto", not {value!r}')
    return value


def _explain(total: int, *, micro: int, steps: int, ranks: int) -> str:
    product = f"{MICRO} {micro} x {STEPS} {steps} x {ranks} ranks = {micro * steps * ranks}"
    share = f'"{TOTAL}" {total} is not {product}'
    if total % ranks:
        better = max(1, round(total / ranks)) * ranks
        return f"{share}: {ranks} ranks do not divide {total}, write {TOTAL}={better}"
    local = total // ranks
    fitting = max(size for size in range(1, min(max(micro, 1), local) + 1) if local % size == 0)
    return f'{share}: write {MICRO}={fitting} and {STEPS}={local // fitting} (or "auto")'
