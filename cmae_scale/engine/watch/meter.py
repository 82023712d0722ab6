"""Losses between two log lines: kept on the device, read with one host sync, agreed by all ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.collectives import gather_objects, gather_rows, world_size
from cmae_scale.core.errors import DivergedError


class Meter:
    """Collects the losses of steps, which have `names`, and the keys of their samples until they are read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._losses: list[Tensor] = []
        self._keys: list[tuple[str, ...]] = []
        self._steps: list[int] = []

    def add(self, step: int, losses: Float[Tensor, " metrics"], *, keys: Sequence[str]) -> None:
        """Remember one step of this rank. Waits for nothing."""
        self._losses.append(losses)
        self._keys.append(tuple(keys))
        self._steps.append(step)

    def read(self) -> dict[str, float]:
        """Means by name, over the steps since the last reading and over all ranks.

        Every rank must call it at the same step. Raises DivergedError on all of them when a loss of any rank
        was not finite, naming the samples.
        """
        table = (
            gather_rows(torch.stack(self._losses)).view(world_size(), len(self._steps), len(self.names)).cpu()
        )
        finite = table.isfinite().all(dim=2)
        if not finite.all():
            self._stop(finite, table)
        means = table.double().mean(dim=(0, 1)).tolist()
        self._losses, self._keys, self._steps = [], [], []
        return dict(zip(self.names, means, strict=True))

    def _stop(self, finite: Tensor, table: Tensor) -> None:
        at = int((~finite.all(dim=0)).nonzero()[0])
        ranks = (~finite[:, at]).nonzero().flatten().tolist()
        keys = gather_objects(self._keys[at])
        samples = [key for rank in ranks for key in keys[rank]]
        shown = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
        values = ", ".join(f"{value:g}" for value in table[ranks[0], at].tolist())
        raise DivergedError(
            f"the loss at step {self._steps[at]} is not finite ({', '.join(self.names)}: {values}) on rank "
            f"{', '.join(map(str, ranks))}, samples {shown}: the states in checkpoints/ are from before; "
            "lower cmae.schedule.base_lr, set gradient_clipping, or look at these images"
        )
