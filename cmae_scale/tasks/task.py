"""What a task is, to whoever trains it and to whoever judges it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.data.stream import CropBatch
from cmae_scale.tasks.evaluator import EvalResult, Evaluator


@dataclass(frozen=True)
class Outcome:
    """What an evaluation came to: of the network, or of the best of several heads."""

    result: EvalResult
    found: dict[str, Any]  # for metrics.jsonl
    head: int = 0


class Task(Protocol):
    """A network and what its training step is. It knows no engine: the engine drives it.

    Row numbers are of the global batch, so that nothing random depends on the number of ranks.
    """

    @property
    def model(self) -> nn.Module:
        """The network, on the CPU until the engine takes it."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `losses` gives. The first is minimised."""

    @property
    def image_flops(self) -> int:
        """Floating-point operations of one image's training step."""

    def groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with an "lr_scale" each."""

    def prepare(self, part: CropBatch, *, step: int, first_row: int, total: int) -> tuple[Tensor, Tensor]:
        """Input and target of a micro-batch that begins at `first_row` of `total`."""

    def losses(self, output: Tensor, target: Tensor) -> Float[Tensor, " metrics"]:
        """Means over the micro-batch, with gradient."""

    def evaluate(self, state: Mapping[str, Tensor], *, evaluator: Evaluator) -> Outcome:
        """How good the network with these weights is. All ranks call it together."""

    def export(self, state: Mapping[str, Tensor], folder: Path, *, head: int) -> None:
        """Write it, with one of its heads, as a timm folder."""
