"""Losses between two log lines: kept on the device, read with one host sync, agreed by all ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.collectives import gather_rows, world_size


class MetricAverage:
    """Collects the losses of steps, which have `names`, until they are read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._losses: list[Tensor] = []

    def add(self, losses: Float[Tensor, " metrics"]) -> None:
        """Remember one step of this rank. Waits for nothing."""
        self._losses.append(losses)

    def read(self) -> dict[str, float | None]:
        """Means by name, over the steps since the last reading and over all ranks; None without any step.

        Every rank must call it at the same step, and have added the same ones.
        """
        if not self._losses:
            return dict.fromkeys(self.names)
        table = gather_rows(torch.stack(self._losses)).view(world_size(), len(self._losses), len(self.names))
        means = table.cpu().double().mean(dim=(0, 1)).tolist()
        self._losses = []
        return dict(zip(self.names, means, strict=True))
