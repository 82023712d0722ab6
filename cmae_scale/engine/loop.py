"""The training loop of every run: one optimizer step after the other, with its lines, states and decisions.

What pre-training and fine-tuning do differently in a step is a `Method`; what may happen to a run of many
processes (data that ends, a signal, a step that goes wrong, a state to save) is decided here, by all ranks
together.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.schedules import WarmupCosine
from cmae_scale.core.errors import DivergedError
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.stream import MasterBatch
from cmae_scale.engine.loss_trend import TrendFile
from cmae_scale.engine.metrics.logger import Journal
from cmae_scale.engine.optim import set_learning_rate_
from cmae_scale.engine.process.agreement import RollCall
from cmae_scale.engine.process.heartbeat import PATIENT
from cmae_scale.engine.process.signals import InterruptedRunError
from cmae_scale.engine.skipped_steps import SkippedSteps
from cmae_scale.engine.step_guard import Guard

Feed = Callable[
    [range], AbstractContextManager[Iterator[MasterBatch]]
]  # a rank's micro-batches of some steps, in main memory

LAUNCHERS_GRACE_S = 30.0  # what the deepspeed launcher and Slurm give a process between SIGTERM and kill -9


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
    feed: Feed,
    *,
    steps: range,
    lr: WarmupCosine,
    bad: BadSamples,
    evaluation: Evaluation | None = None,
) -> None:
    """The optimizer steps `steps`, with an evaluation whenever it is due.

    Raises, on all ranks, InterruptedRunError when one of them was asked to leave and DivergedError when the
    run must stop at a bad step; the state is saved then.
    """
    course = Course(method, journal, lr=lr, bad=bad, end=steps.stop, evaluation=evaluation)
    while course.done < steps.stop:
        ahead = range(course.done, steps.stop)
        with feed(ahead) as masters, journal.session.use_attention():
            for step in journal.watch(ahead):
                if not course.take(step, masters):
                    break  # gone back to a state: its steps' data comes again


class Course:
    """A run on its way: `done` steps are done, the state after `saved` is on disk."""

    def __init__(
        self,
        method: Method,
        journal: Journal,
        *,
        lr: WarmupCosine,
        bad: BadSamples,
        end: int,
        evaluation: Evaluation | None,
    ) -> None:
        self.method, self.journal, self.lr, self.bad, self.end = method, journal, lr, bad, end
        self.evaluation = evaluation
        self.session = session = journal.session
        self.done = self.saved = session.first_step
        self._first = session.first_step
        self._pulse = session.place.pulse
        faults, world = session.run.settings.faults, session.place.world
        self._roll_call = RollCall(session.place.stop)
        self._skipped = SkippedSteps(
            session.run.out / "skipped_steps.jsonl", faults=faults, is_first=world.is_first
        )
        self._guard = Guard(
            session.engine,
            metric_names=method.metric_names,
            device=session.place.device,
            spike=faults.spike,
        )
        self._trends = TrendFile(session.run.out / "loss_trend.json", is_first=world.is_first)
        if faults.spike is not None:
            self._trends.load_(self._guard.trend, step=self.done)

    def take(self, step: int, masters: Iterator[MasterBatch]) -> bool:
        """Optimizer step `step`, with its lines and its state. False when the run went back to a state."""
        parts = self._take_data(step, masters)
        set_learning_rate_(self.session.engine, self.lr, step=step)
        if step in self._skipped:
            self._guard.pass_over()
        elif not self._update(step, parts):
            return False
        self.done = step + 1
        times, log_every = self.journal.times, self.session.run.settings.monitor.log_every
        saves = self.done % times.save_every_steps == 0 or self.done == self.end
        evaluation = self.evaluation
        is_due = evaluation is not None and evaluation.is_due(self.done)
        if saves or is_due or self.done % log_every == 0:
            self._write()
        if evaluation is not None and is_due:
            self._pulse.enter("evaluating", step=self.done, patience=PATIENT)
            self.journal.note(self.done, evaluation.evaluate(self.done))
        if saves:
            self._save()
        return True

    def _take_data(self, step: int, masters: Iterator[MasterBatch]) -> list[MasterBatch]:
        """This rank's micro-batches, once all ranks have theirs and none was asked to leave."""
        patience = PATIENT if step == self._first else 1.0
        self._pulse.enter("reading data", step=step, patience=patience)
        with self.journal.waiting_for_data():
            answer = self._roll_call.answer(
                lambda: list(islice(masters, self.method.batch.accumulation)),
                then=lambda: self._pulse.enter("waiting for the others", step=step, patience=patience),
            )
        if answer.request is not None:
            failed = self._save_now()
            raise InterruptedRunError(answer.request, step=self.done, failed=failed)
        assert answer.result is not None
        self._pulse.enter("computing gradients", step=step, patience=patience)
        return answer.result

    def _update(self, step: int, parts: Sequence[MasterBatch]) -> bool:
        """The step itself; a bad one moves nothing. False when the run went back to a state."""
        session = self.session
        self._guard.open()
        losses = self.method.accumulate(parts, step=step)
        self._pulse.enter("updating the weights", step=step, patience=PATIENT if step == self._first else 1.0)
        self.journal.look_at_gradients()
        with session.spans.span("step"):
            bad = self._guard.apply(step, losses, keys=[key for part in parts for key in part.keys])
        if session.engine.was_step_applied():  # fp16 skips a step that overflows
            with session.spans.span("ema"):
                self.method.follow_(step=step)
        if bad is None:
            self.journal.add(losses)
            return True
        try:
            decision = self._skipped.decide(bad, newest_state=self.saved or None)
        except DivergedError:
            self._save_now()
            raise
        if decision == "rewind" and session.restore():
            self.journal.say(f"warning: {bad}: back to the state of step {session.first_step}, without it")
            self._go_back(session.first_step)
            return False
        self.journal.say(f"warning: {bad}: the step is left out, nothing of it reached the weights")
        return True

    def _go_back(self, step: int) -> None:
        self.done = self.saved = step
        self.journal.go_to(step)
        if self._guard.spike is not None:
            self._trends.load_(self._guard.trend, step=step)

    def _write(self) -> None:
        self._pulse.enter("writing metrics", step=self.done)
        scheduled = {
            **self.method.scheduled(self.done - 1),
            "skipped_steps": len(self._skipped.before(self.done)),
        }
        self.journal.write(self.done, scheduled=scheduled, bad=self.bad)

    def _save_now(self) -> str | None:
        """Save before leaving, if there is anything new. None, or what went wrong."""
        if self.done == self.saved:
            return None
        if self.done > self.journal.written:
            self._write()
        return self._save()

    def _save(self) -> str | None:
        self._pulse.enter("saving the state", step=self.done, patience=PATIENT)
        started_s = time.monotonic()
        if self._guard.spike is not None:
            self._trends.save(self._guard.trend, step=self.done)
        with self.session.spans.span("save"):
            failed = self.session.save(self.done, keep_every_steps=self.journal.times.keep_every_steps)
        if failed:
            self.journal.say(
                f"warning: step {self.done} is not saved ({failed}); older states are as they were"
            )
            return failed
        self.saved = self.done
        took_s = time.monotonic() - started_s
        if took_s > LAUNCHERS_GRACE_S / 2:
            self.journal.say(
                f"warning: saving took {took_s:.0f} s: have the scheduler warn this run some minutes ahead, "
                f"for the {LAUNCHERS_GRACE_S:.0f} s between SIGTERM and the kill would hardly do"
            )
        return None
