"""Losses between two log lines: kept on the device, read with one host sync, agreed by all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmae_scale.core.collectives import gather_objects, gather_rows, world_size
from cmae_scale.core.errors import DivergedError
from cmae_scale.engine.step import StepLosses


@dataclass(frozen=True)
class MeanLosses:
    """Means over the steps since the last reading and over all ranks."""

    total: float
    pixel: float
    contrast: float


class Meter:
    """Collects the losses of steps and the keys of their samples until they are read."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._keys: list[tuple[str, ...]] = []
        self._steps: list[int] = []

    def add(self, step: int, losses: StepLosses, *, keys: Sequence[str]) -> None:
        """Remember one step of this rank. Waits for nothing."""
        self._losses.append(torch.stack([losses.total, losses.pixel, losses.contrast]))
        self._keys.append(tuple(keys))
        self._steps.append(step)

    def read(self) -> MeanLosses:
        """Means since the last reading; every rank must call it at the same step.

        Raises DivergedError on all ranks when a loss of any rank was not finite, naming the samples.
        """
        table = gather_rows(torch.stack(self._losses)).view(world_size(), len(self._steps), 3).cpu()
        finite = table.isfinite().all(dim=2)
        if not finite.all():
            self._stop(finite, table)
        total, pixel, contrast = table.double().mean(dim=(0, 1)).tolist()
        self._losses, self._keys, self._steps = [], [], []
        return MeanLosses(total=total, pixel=pixel, contrast=contrast)

    def _stop(self, finite: Tensor, table: Tensor) -> None:
        at = int((~finite.all(dim=0)).nonzero()[0])
        ranks = (~finite[:, at]).nonzero().flatten().tolist()
        keys = gather_objects(self._keys[at])
        samples = [key for rank in ranks for key in keys[rank]]
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        values = ", ".join(f"{value:g}" for value in table[ranks[0], at].tolist())
        raise DivergedError(
            f"the loss at step {self._steps[at]} is not finite (total, pixel, contrast: {values}) on rank "
            f"{', '.join(map(str, ranks))}, samples {shown}: the states in checkpoints/ are from before; "
            "lower cmae.schedule.base_lr, set gradient_clipping, or look at these images"
        )
