"""A step that goes wrong moves nothing: neither weights nor target, moments, statistics nor counters.

An update is left out when the norm of the whole gradient is not finite (see `zero.patches.CheckedUpdate`).
The guard makes everything that is wrong with a step show in that norm, and says what happened.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.collectives import gather_objects, mean_of_ranks
from cmae_scale.core.errors import DivergedError
from cmae_scale.engine.zero.patches import CheckedUpdate

SHOWN_SAMPLES = 8
MAX_OVERFLOWS = (
    64  # from the largest scale that fp16 can use, halving each time, to one far below its smallest
)


class BadStep(NamedTuple):
    """What was wrong with a step, as all ranks know it. `ranks` is empty where no rank could be told."""

    step: int
    cause: str  # "loss is not finite", "gradient is not finite", "loss jumped"
    ranks: tuple[int, ...]
    losses: dict[str, dict[str, float]]  # by rank, of the ranks concerned
    samples: tuple[str, ...]

    def __str__(self) -> str:
        """For instance: the loss is not finite at step 7 on rank 1 (loss nan, pixel 0.9), samples a, b."""
        shown = ", ".join(self.samples[:SHOWN_SAMPLES])
        more = len(self.samples) - SHOWN_SAMPLES
        values = "; ".join(
            ", ".join(f"{name} {value:g}" for name, value in losses.items())
            for losses in list(self.losses.values())[:2]
        )
        where = f"on rank {', '.join(map(str, self.ranks))}" if self.ranks else "on no single rank"
        return f"the {self.cause} at step {self.step} {where} ({values}), samples {shown}" + (
            f" and {more} more" if more > 0 else ""
        )


@dataclass(frozen=True)
class LossStatistics:
    """Running mean and variance of the losses of applied steps, on the device: asking waits for nothing."""

    WARM_STEPS = 20  # before so many, nothing is a jump
    MEMORY = 0.99  # weight of the past: about 100 steps

    values: Float[Tensor, "3"]  # number of losses, mean, variance

    def is_jump(self, loss: Float[Tensor, ""], *, deviations: float) -> Tensor:
        """Whether `loss` is more than so many standard deviations above the mean."""
        count, mean, variance = self.values
        # a floor under the deviation: of losses that hardly move, every move would be a jump
        limit = mean + deviations * variance.sqrt().clamp(min=1e-3 * mean.abs())
        jump: Tensor = (count >= self.WARM_STEPS) & (loss.double() > limit)
        return jump

    def add_(self, loss: Float[Tensor, ""]) -> None:
        """Follow `loss`. Young averages are plain ones, so that the first loss does not weigh too much."""
        count, mean, variance = self.values
        share = torch.clamp(1 / (count + 1), min=1 - self.MEMORY)
        away = loss.double() - mean
        new_mean = mean + share * away
        new_variance = (1 - share) * (variance + share * away * away)
        self.values.copy_(torch.stack([count + 1, new_mean, new_variance]))


class NonFiniteGuard:
    """Stands between a rank's gradients and its weights. All ranks call its methods together.

    Per step it copies the model's buffers (running statistics, a few kB), multiplies the loss by a 1 that is
    NaN when something is wrong, and looks at the gradient of one parameter per part of the model, so that a
    NaN can be traced to its rank. None of that waits for the device.
    """

    def __init__(
        self,
        engine: Any,
        *,
        metric_names: Sequence[str],
        device: torch.device,
        spike: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.names = tuple(metric_names)
        self.spike = spike
        self.statistics = LossStatistics(torch.zeros(3, dtype=torch.float64, device=device))
        self.recall(extra or {})
        self.bad: BadStep | None = None  # what was wrong with the last step
        self._buffers = list(engine.module.buffers())
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=device)
        self._spiked = torch.zeros((), dtype=torch.bool, device=device)
        self._losses: list[Tensor] = []
        self._step = 0
        self._keys: Sequence[str] = ()
        self._step_loss: Tensor | None = None
        self._overflows = 0
        self._update = CheckedUpdate(engine)
        self._watch_backward()

    @torch.no_grad()
    def open(self, step: int, *, keys: Sequence[str]) -> None:
        """Optimizer step `step` begins, whose samples on this rank have `keys`."""
        self._step, self._keys, self.bad = step, keys, None
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        self._bad_gradient.zero_()
        self._spiked.zero_()
        self._losses = []

    def apply(self, losses: Float[Tensor, " metrics"]) -> bool:
        """Update the weights with the gradients that are there, or leave everything as it was: see `bad`.

        Returns whether the weights moved. An fp16 step that overflows its loss scale is no bad step, but
        moves nothing either.
        """
        try:
            is_applied = self._update.step()
        except Exception as error:
            if "loss scale" not in str(error):
                raise
            raise DivergedError(f"fp16 overflows at step {self._step} at any loss scale: use bf16") from error
        if is_applied:
            self._overflows = 0
            if self.spike is not None and self._step_loss is not None:
                self.statistics.add_(self._step_loss)
            return True
        self._undo()
        self.bad = self._explain(losses)
        if self.bad is None:
            self._overflows += 1
            if self._overflows > MAX_OVERFLOWS:
                raise DivergedError(
                    f"fp16 overflowed {self._overflows} steps in a row, the last at step {self._step}: "
                    "use bf16"
                )
        return False

    def remember(self, extra: dict[str, Any]) -> None:
        """Write the loss statistics into a checkpoint's `extra`: a resumed run finds the same jumps."""
        if self.spike is not None:
            extra["loss_statistics"] = self.statistics.values.tolist()

    def recall(self, extra: Mapping[str, Any]) -> None:
        """Take up what `remember` wrote; without it the statistics begin anew."""
        values = extra.get("loss_statistics")
        is_whole = isinstance(values, list) and [type(value) for value in values] == [float] * 3
        self.statistics.values.copy_(torch.tensor(values if is_whole else [0.0] * 3, dtype=torch.float64))

    def pass_over(self) -> None:
        """A step that is left out from the start: what is told of it is what is told of a bad one."""
        self._update.pass_over()

    @torch.no_grad()
    def _undo(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)
        self._update.gather_whole_()

    def _explain(self, losses: Tensor) -> BadStep | None:
        """Why no update came, asked of all ranks. None: an fp16 overflow."""
        own = (losses.tolist(), bool(self._bad_gradient), bool(self._spiked))
        everywhere = gather_objects(own)
        bad_parts = [sum(not math.isfinite(value) for value in values) for values, _, _ in everywhere]
        ranks: list[int] = []
        if any(bad_parts):
            cause = "loss is not finite"
            # statistics over all ranks carry a NaN to the losses of the others, but not to all of their parts
            ranks = [rank for rank, count in enumerate(bad_parts) if count == max(bad_parts)]
        elif any(spiked for _, _, spiked in everywhere):
            cause = "loss jumped"
        elif self._update.scales_loss:
            return None
        else:
            cause = "gradient is not finite"
            ranks = [rank for rank, (_, bad, _) in enumerate(everywhere) if bad]
            if len(ranks) == len(everywhere) > 1:
                ranks = []
        concerned = ranks or range(len(everywhere))
        own_keys = list(self._keys) if self._rank() in concerned else []
        return BadStep(
            step=self._step,
            cause=cause,
            ranks=tuple(ranks),
            losses={str(rank): dict(zip(self.names, everywhere[rank][0], strict=True)) for rank in concerned},
            samples=tuple(key for share in gather_objects(own_keys) for key in share),
        )

    def _rank(self) -> int:
        return int(self.engine.global_rank)

    def _watch_backward(self) -> None:
        original = self.engine.backward

        def backward(loss: Tensor, retain_graph: bool = False) -> Tensor:
            scaled: Tensor = original(loss * self._one_or_nan(loss.detach()), retain_graph=retain_graph)
            return scaled

        self.engine.backward = backward

        def look(gradient: Tensor) -> None:
            self._bad_gradient.logical_or_(~gradient.isfinite().all())

        for part in self.engine.module.children():
            first = next((p for p in part.parameters() if p.requires_grad), None)
            if first is not None:
                first.register_hook(look)

    def _one_or_nan(self, loss: Tensor) -> Tensor:
        """1, or NaN for a loss that must not reach the weights: then no gradient of the step is finite."""
        factor = 1 + 0 * loss  # 0 * inf is NaN too
        if self.spike is None:
            return factor
        self._losses.append(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            return factor
        self._step_loss = mean_of_ranks(torch.stack(self._losses).mean())
        self._spiked.copy_(self.statistics.is_jump(self._step_loss, deviations=self.spike))
        return torch.where(self._spiked, math.nan, factor)
