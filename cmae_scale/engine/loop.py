"""The training loop of every run: one optimizer step after the other, with its lines, states and decisions.

What pre-training and fine-tuning do differently in a step is a `TrainTask`; what may happen to a run of many
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
from cmae_scale.data.stream import CropBatch
from cmae_scale.engine.loss_trend import TrendFile
from cmae_scale.engine.metrics.logger import MetricsLogger
from cmae_scale.engine.optim import set_learning_rate_
from cmae_scale.engine.process.agreement import RankAgreement
from cmae_scale.engine.process.heartbeat import PATIENT
from cmae_scale.engine.process.signals import InterruptedRunError
from cmae_scale.engine.skipped_steps import SkippedSteps
from cmae_scale.engine.step_guard import NonFiniteGuard

Feed = Callable[
    [range], AbstractContextManager[Iterator[CropBatch]]
]  # a rank's micro-batches of some steps, in main memory

LAUNCHERS_GRACE_S = 30.0  # what the deepspeed launcher and Slurm give a process between SIGTERM and kill -9


class TrainTask(Protocol):
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

    def accumulate(self, crops: Sequence[CropBatch], *, step: int) -> Float[Tensor, " metrics"]:
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
    task: TrainTask,
    logger: MetricsLogger,
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
    trainer = Trainer(task, logger, lr=lr, bad=bad, end=steps.stop, evaluation=evaluation)
    while trainer.done < steps.stop:
        ahead = range(trainer.done, steps.stop)
        with feed(ahead) as crops, logger.state.use_attention():
            for step in logger.watch(ahead):
                if not trainer.take(step, crops):
                    break  # gone back to a state: its steps' data comes again


class Trainer:
    """A run on its way: `done` steps are done, the state after `saved` is on disk."""

    def __init__(
        self,
        task: TrainTask,
        logger: MetricsLogger,
        *,
        lr: WarmupCosine,
        bad: BadSamples,
        end: int,
        evaluation: Evaluation | None,
    ) -> None:
        self.task, self.logger, self.lr, self.bad, self.end = task, logger, lr, bad, end
        self.evaluation = evaluation
        self.state = state = logger.state
        self.done = self.saved = state.first_step
        self._first = state.first_step
        self._heartbeat = state.context.heartbeat
        faults, world = state.run.settings.faults, state.context.world
        self._agreement = RankAgreement(state.context.stop)
        self._skipped = SkippedSteps(
            state.run.out / "skipped_steps.jsonl", faults=faults, is_first=world.is_first
        )
        self._guard = NonFiniteGuard(
            state.engine,
            metric_names=task.metric_names,
            device=state.context.device,
            spike=faults.spike,
        )
        self._trends = TrendFile(state.run.out / "loss_trend.json", is_first=world.is_first)
        if faults.spike is not None:
            self._trends.load_(self._guard.trend, step=self.done)

    def take(self, step: int, crops: Iterator[CropBatch]) -> bool:
        """Optimizer step `step`, with its lines and its state. False when the run went back to a state."""
        parts = self._take_data(step, crops)
        set_learning_rate_(self.state.engine, self.lr, step=step)
        if step in self._skipped:
            self._guard.pass_over()
        elif not self._update(step, parts):
            return False
        self.done = step + 1
        times, log_every = self.logger.times, self.state.run.settings.monitor.log_every
        saves = self.done % times.save_every_steps == 0 or self.done == self.end
        evaluation = self.evaluation
        is_due = evaluation is not None and evaluation.is_due(self.done)
        if saves or is_due or self.done % log_every == 0:
            self._write()
        if evaluation is not None and is_due:
            self._heartbeat.enter("evaluating", step=self.done, patience=PATIENT)
            self.logger.note(self.done, evaluation.evaluate(self.done))
        if saves:
            self._save()
        return True

    def _take_data(self, step: int, crops: Iterator[CropBatch]) -> list[CropBatch]:
        """This rank's micro-batches, once all ranks have theirs and none was asked to leave."""
        patience = PATIENT if step == self._first else 1.0
        self._heartbeat.enter("reading data", step=step, patience=patience)
        with self.logger.waiting_for_data():
            answer = self._agreement.answer(
                lambda: list(islice(crops, self.task.batch.accumulation)),
                then=lambda: self._heartbeat.enter("waiting for the others", step=step, patience=patience),
            )
        if answer.request is not None:
            failed = self._save_now()
            raise InterruptedRunError(answer.request, step=self.done, failed=failed)
        assert answer.result is not None
        self._heartbeat.enter("computing gradients", step=step, patience=patience)
        return answer.result

    def _update(self, step: int, parts: Sequence[CropBatch]) -> bool:
        """The step itself; a bad one moves nothing. False when the run went back to a state."""
        state = self.state
        self._guard.open()
        losses = self.task.accumulate(parts, step=step)
        self._heartbeat.enter(
            "updating the weights", step=step, patience=PATIENT if step == self._first else 1.0
        )
        self.logger.look_at_gradients()
        with state.timer.span("step"):
            bad = self._guard.apply(step, losses, keys=[key for part in parts for key in part.keys])
        if state.engine.was_step_applied():  # fp16 skips a step that overflows
            with state.timer.span("ema"):
                self.task.follow_(step=step)
        if bad is None:
            self.logger.add(losses)
            return True
        try:
            decision = self._skipped.decide(bad, newest_state=self.saved or None)
        except DivergedError:
            self._save_now()
            raise
        if decision == "rewind" and state.restore():
            self.logger.say(f"warning: {bad}: back to the state of step {state.first_step}, without it")
            self._go_back(state.first_step)
            return False
        self.logger.say(f"warning: {bad}: the step is left out, nothing of it reached the weights")
        return True

    def _go_back(self, step: int) -> None:
        self.done = self.saved = step
        self.logger.go_to(step)
        if self._guard.spike is not None:
            self._trends.load_(self._guard.trend, step=step)

    def _write(self) -> None:
        self._heartbeat.enter("writing metrics", step=self.done)
        scheduled = {
            **self.task.scheduled(self.done - 1),
            "skipped_steps": len(self._skipped.before(self.done)),
        }
        self.logger.write(self.done, scheduled=scheduled, bad=self.bad)

    def _save_now(self) -> str | None:
        """Save before leaving, if there is anything new. None, or what went wrong."""
        if self.done == self.saved:
            return None
        if self.done > self.logger.written:
            self._write()
        return self._save()

    def _save(self) -> str | None:
        self._heartbeat.enter("saving the state", step=self.done, patience=PATIENT)
        started_s = time.monotonic()
        if self._guard.spike is not None:
            self._trends.save(self._guard.trend, step=self.done)
        with self.state.timer.span("save"):
            failed = self.state.save(self.done, keep_every_steps=self.logger.times.keep_every_steps)
        if failed:
            self.logger.say(
                f"warning: step {self.done} is not saved ({failed}); older states are as they were"
            )
            return failed
        self.saved = self.done
        took_s = time.monotonic() - started_s
        if took_s > LAUNCHERS_GRACE_S / 2:
            self.logger.say(
                f"warning: saving took {took_s:.0f} s: have the scheduler warn this run some minutes ahead, "
                f"for the {LAUNCHERS_GRACE_S:.0f} s between SIGTERM and the kill would hardly do"
            )
        return None
