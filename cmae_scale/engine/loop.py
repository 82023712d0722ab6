"""The training loop of every run: one optimizer step after the other, with its lines, states and decisions.

What pre-training and fine-tuning do differently in a step is a `TrainTask`; what may happen to a run of many
processes (data that ends, a signal, a step that goes wrong, a state to save) is decided here, by all ranks
together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.batches import BatchSizes
from cmae_scale.config.schedules import Timetable, WarmupCosine
from cmae_scale.core.errors import DivergedError
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.stream import CropBatch
from cmae_scale.engine.checkpoint.save_load import PendingSave
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.metrics.logger import MetricsLogger
from cmae_scale.engine.process.agreement import RankAgreement
from cmae_scale.engine.process.heartbeat import PATIENT
from cmae_scale.engine.process.signals import InterruptedRunError
from cmae_scale.engine.skipped_steps import SkippedSteps
from cmae_scale.engine.step_guard import NonFiniteGuard
from cmae_scale.engine.train_state import TrainState

Feed = Callable[
    [range], AbstractContextManager[Iterator[CropBatch]]
]  # a rank's micro-batches of some steps, in main memory

LAUNCHERS_GRACE_S = 30.0  # what the deepspeed launcher and Slurm give a process between SIGTERM and kill -9


class TrainTask(Protocol):
    """What a run makes of its images."""

    @property
    def state(self) -> TrainState:
        """Engine, moving average and checkpoints of the run."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of what `take_step` gives. The first is the loss that is minimised."""

    @property
    def batch(self) -> BatchSizes:
        """How a step's images are spread over ranks and micro-batches."""

    @property
    def image_flops(self) -> int:
        """Floating-point operations of one image's training step."""

    @property
    def health(self) -> Health | None:
        """What is measured before each log line, if anything."""

    def take_step(
        self, crops: Sequence[CropBatch], *, step: int, update: Callable[[Tensor], bool]
    ) -> Float[Tensor, " metrics"]:
        """One optimizer step on a rank's micro-batches; its mean losses on the device, without gradient.

        `engine.step()` is called here for all micro-batches but the last; `update`, called with the losses
        once all gradients are there, does it for the last, and says whether the weights moved.
        """

    def scheduled(self, step: int) -> dict[str, float]:
        """What changes from step to step by a schedule, besides the learning rate."""


class Evaluation(Protocol):
    """What is found out now and then between steps, by all ranks together."""

    def is_due(self, done: int) -> bool:
        """Whether after `done` steps it is time."""

    def evaluate(self, done: int) -> dict[str, Any]:
        """What was found, by name: numbers, or numbers by class. Leaves the training as it is."""


def open_logger(task: TrainTask, *, times: Timetable) -> MetricsLogger:
    """What writes the run's metrics; its lines begin after the steps that are done already."""
    state = task.state
    return MetricsLogger(
        state.run,
        world=state.context.world,
        device=state.context.device,
        times=times,
        metric_names=task.metric_names,
        image_flops=task.image_flops,
        timer=state.timer,
        health=task.health,
        extra=state.extra,
        first_step=state.first_step,
    )


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
        with feed(ahead) as crops, task.state.use_attention():
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
        self.state = state = task.state
        self.done = self.saved = state.first_step
        self._pending: PendingSave | None = None  # a state that is being written
        self._first = state.first_step
        self._heartbeat = state.context.heartbeat
        faults, world = state.run.settings.faults, state.context.world
        self._agreement = RankAgreement(state.context.stop, step_timeout_s=faults.step_timeout_s)
        self._skipped = SkippedSteps(
            state.run.out / "skipped_steps.jsonl", faults=faults, is_first=world.is_first
        )
        self._guard = NonFiniteGuard(
            state.engine,
            metric_names=task.metric_names,
            device=state.context.device,
            spike=faults.spike,
            extra=state.extra,
        )

    def take(self, step: int, crops: Iterator[CropBatch]) -> bool:
        """Optimizer step `step`, with its lines and its state. False when the run went back to a state."""
        parts = self._take_data(step, crops)
        set_learning_rate_(self.state.engine, self.lr, step=step)
        if step in self._skipped.steps:
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
            self._commit()  # it may take long
            self._heartbeat.enter("evaluating", step=self.done, patience=PATIENT)
            self.logger.note(self.done, evaluation.evaluate(self.done))
        if saves:
            beside = self.state.run.settings.checkpoint.beside and self.done < self.end
            self._save(is_beside=beside)
        return True

    def _take_data(self, step: int, crops: Iterator[CropBatch]) -> list[CropBatch]:
        """This rank's micro-batches, once all ranks have theirs and none was asked to leave."""
        patience = PATIENT if step == self._first else 1.0
        self._heartbeat.enter("reading data", step=step, patience=patience)
        with self.logger.waiting_for_data():
            answer = self._agreement.answer(
                lambda: list(islice(crops, self.task.batch.accumulation)),
                then=lambda: self._heartbeat.enter("waiting for the others", step=step, patience=patience),
                is_busy=lambda: self._pending is not None and not self._pending.is_written,
            )
        if answer.request is not None:
            failed = self._save_now()
            raise InterruptedRunError(answer.request, step=self.done, failed=failed)
        if not answer.is_busy:
            self._commit()
        assert answer.result is not None
        self._heartbeat.enter("computing gradients", step=step, patience=patience)
        return answer.result

    def _update(self, step: int, parts: Sequence[CropBatch]) -> bool:
        """The step itself; a bad one moves nothing. False when the run went back to a state."""
        self._guard.open(step, keys=[key for part in parts for key in part.keys])
        losses = self.task.take_step(parts, step=step, update=self._apply)
        bad = self._guard.bad
        if bad is None:
            self.logger.add(losses)
            return True
        self._commit()
        try:
            decision = self._skipped.decide(bad, newest_state=self.saved or None)
        except DivergedError:
            self._save_now()
            raise
        if decision == "rewind" and self.state.restore():
            step = self.state.first_step
            self.logger.say(f"warning: {bad}: back to the checkpoint of step {step}, without it")
            self._go_back(step)
            return False
        self.logger.say(f"warning: {bad}: the step is left out, nothing of it reached the weights")
        return True

    def _apply(self, losses: Tensor) -> bool:
        """Update the weights unless something is wrong with their gradients. Whether they moved."""
        first, state = self.done == self._first, self.state
        self._heartbeat.enter("updating the weights", step=self.done, patience=PATIENT if first else 1.0)
        if self.task.health is not None and self.task.health.is_due:
            self.task.health.look_at_gradients(state.engine)
        with state.timer.span("step"):
            return self._guard.apply(losses)

    def _go_back(self, step: int) -> None:
        self.done = self.saved = step
        self._guard.recall(self.state.extra)
        self.logger.go_to(step)

    def _write(self) -> None:
        self._heartbeat.enter("writing metrics", step=self.done)
        scheduled = {
            **self.task.scheduled(self.done - 1),
            "skipped_steps": len(self._skipped.before(self.done)),
        }
        self.logger.write(
            self.done,
            lr=read_learning_rate(self.state.engine),
            grad_norm=read_grad_norm(self.state.engine),
            scheduled=scheduled,
            bad=self.bad,
        )

    def _save_now(self) -> str | None:
        """Save before leaving, if there is anything new. None, or what went wrong."""
        self._commit()
        if self.done == self.saved:
            return None
        if self.done > self.logger.written:
            self._write()
        return self._save(is_beside=False)

    def _save(self, *, is_beside: bool) -> str | None:
        """Begin a state, and wait for it if it is not written beside training. None, or what went wrong."""
        self._commit()
        self._heartbeat.enter("saving a checkpoint", step=self.done, patience=PATIENT)
        self._guard.remember(self.state.extra)
        with self.state.timer.span("save"):
            begun = self.state.begin_save(
                self.done, keep_every_steps=self.logger.times.keep_every_steps, is_beside=is_beside
            )
        if isinstance(begun, str):
            return self._tell_unsaved(self.done, begun)
        self._pending = begun
        return None if is_beside else self._commit()

    def _commit(self) -> str | None:
        """Have the state that is being written count, if there is one. None, or what went wrong."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        self._heartbeat.enter("saving a checkpoint", step=pending.step, patience=PATIENT)
        with self.state.timer.span("save"):
            failed = pending.commit()
        if failed:
            return self._tell_unsaved(pending.step, failed)
        self.saved = pending.step
        if pending.took_s > LAUNCHERS_GRACE_S / 2:
            self.logger.say(
                f"warning: saving took {pending.took_s:.0f} s: have the scheduler warn this run some minutes "
                f"ahead, for the {LAUNCHERS_GRACE_S:.0f} s between SIGTERM and the kill would hardly do"
            )
        return None

    def _tell_unsaved(self, step: int, failed: str) -> str:
        self.logger.say(f"warning: step {step} is not saved ({failed}); older checkpoints are as they were")
        return failed


def set_learning_rate_(engine: Any, lr: WarmupCosine, *, step: int) -> None:
    """Have the engine's update number `step` use `lr`, unless the run file names a DeepSpeed scheduler.

    A group's "lr_scale" is what its peak is multiplied by (layer-wise decay, a sweep).
    """
    if engine.lr_scheduler is None:
        for group in engine.optimizer.param_groups:
            group["lr"] = lr.at(step, scale=group.get("lr_scale", 1.0))


def read_learning_rate(engine: Any) -> float:
    """The learning rate in force: the highest of all groups."""
    return max(float(group["lr"]) for group in engine.optimizer.param_groups)


def read_grad_norm(engine: Any) -> float | None:
    """Norm of the last step's whole gradient before clipping; None where unknown or not finite."""
    norm = engine.get_global_grad_norm()
    return None if norm is None or not math.isfinite(norm) else float(norm)
