"""The training loop of every run: one optimizer step after the other, with its lines, states and decisions.

What pre-training and fine-tuning do differently in a step is a `Method`; what may happen to a run of many
processes (data that ends, a signal, a state to save) is decided here, by all ranks together.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.batches import BatchSizes
from cmae_scale.core.schedules import WarmupCosine
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.stream import MasterBatch
from cmae_scale.engine.optim import set_learning_rate_
from cmae_scale.engine.safety.agreement import Agreement
from cmae_scale.engine.safety.signals import InterruptedRunError, StopRequest
from cmae_scale.engine.watch.journal import Journal


class Method(Protocol):
    """What a run makes of its images."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `accumulate` gives. The first is the loss that is minimised."""

    @property
    def batch(self) -> BatchSizes:
        """How a step's images are spread over ranks and micro-batches."""

    @property
    def image_flops(self) -> int:
        """Floating-point operations of one image's training step."""

    def accumulate(self, masters: Sequence[MasterBatch], *, step: int) -> Float[Tensor, " metrics"]:
        """Gradients of a rank's micro-batches of one step; its mean losses on the device, without gradient.

        `engine.step()` has been called for all micro-batches but the last: that one updates the weights.
        """

    def follow_(self, *, step: int) -> None:
        """Whatever follows an update of the weights that has been applied."""

    def scheduled(self, step: int) -> dict[str, float]:
        """What changes from step to step by a schedule, besides the learning rate."""


def take_steps(
    method: Method,
    journal: Journal,
    masters: Iterator[MasterBatch],
    *,
    steps: range,
    lr: WarmupCosine,
    bad: BadSamples,
) -> None:
    """The optimizer steps `steps`. Raises InterruptedRunError when a rank was asked to leave, state saved."""
    session, times = journal.session, journal.times
    log_every = session.run.cmae.monitor.log_every
    agreement = Agreement()
    with session.use_attention(), StopRequest() as stop:
        for step in journal.watch(steps):
            with journal.waiting_for_data():
                parts = agreement.do(lambda: list(islice(masters, method.batch.accumulation)))
            set_learning_rate_(session.engine, lr.at(step))
            losses = method.accumulate(parts, step=step)
            journal.look_at_gradients()
            with session.spans.span("step"):
                session.engine.step()
            if session.engine.was_step_applied():  # fp16 skips a step that overflows
                with session.spans.span("ema"):
                    method.follow_(step=step)
            journal.add(step, losses, keys=[key for part in parts for key in part.keys])
            done, asked = step + 1, stop.is_agreed()
            saves = asked or done % times.save_every_steps == 0 or done == steps.stop
            if saves or done % log_every == 0:
                journal.write(done, scheduled=method.scheduled(step), bad=bad)
            with session.spans.span("save"):
                failed = session.save(done, keep_every_steps=times.keep_every_steps) if saves else None
            if failed:
                journal.say(f"warning: step {done} is not saved ({failed}); older states are as they were")
            if asked and done < steps.stop:
                raise InterruptedRunError(done)
