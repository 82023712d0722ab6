"""The training loop of every run: one optimizer step after the other, with its lines, states and decisions.

What pre-training and fine-tuning do differently in a step is a `Method`; what may happen to a run of many
processes (data that ends, a signal, a state to save) is decided here, by all ranks together.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

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


class Evaluation(Protocol):
    """What is found out now and then between steps, by all ranks together."""

    def is_due(self, done: int) -> bool:
        """Whether after `done` steps it is time."""

    def evaluate(self, done: int) -> dict[str, Any]:
        """What was found, by name: numbers, or numbers by class. Leaves the training as it is."""


def take_steps(
    method: Method,
    journal: Journal,
    masters: Iterator[MasterBatch],
    *,
    steps: range,
    lr: WarmupCosine,
    bad: BadSamples,
    evaluation: Evaluation | None = None,
) -> None:
    """The optimizer steps `steps`. Raises InterruptedRunError when a rank was asked to leave, state saved."""
    session, times = journal.session, journal.times
    log_every = session.run.settings.monitor.log_every
    agreement = Agreement()
    with session.use_attention(), StopRequest() as stop:
        for step in steps:
            with journal.waiting_for_data():
                parts = agreement.do(lambda: list(islice(masters, method.batch.accumulation)))
            set_learning_rate_(session.engine, lr, step=step)
            losses = method.accumulate(parts, step=step)
            session.engine.step()
            if session.engine.was_step_applied():  # fp16 skips a step that overflows
                method.follow_(step=step)
            journal.add(step, losses, keys=[key for part in parts for key in part.keys])
            done, asked = step + 1, stop.is_agreed()
            saves = asked or done % times.save_every_steps == 0 or done == steps.stop
            is_due = evaluation is not None and not asked and evaluation.is_due(done)
            if saves or is_due or done % log_every == 0:
                journal.write(done, scheduled=method.scheduled(step), bad=bad)
            if evaluation is not None and is_due:
                journal.note(done, evaluation.evaluate(done))
            if saves and (failed := session.save(done)):
                journal.say(f"warning: step {done} is not saved ({failed}); older states are as they were")
            if asked and done < steps.stop:
                raise InterruptedRunError(done)
