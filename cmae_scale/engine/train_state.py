"""A run that is under way: engine, moving average and checkpoints kept in step with each other."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cmae_scale.config.run_file import Run, dump_run
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.credentials import write_settings
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.checkpoint.metadata import CheckpointMetadata
from cmae_scale.engine.checkpoint.save_load import Keeping, PendingSave, Snapshot, begin_save, load_newest
from cmae_scale.engine.ema import Pair, TargetEma
from cmae_scale.engine.metrics.step_timer import StepTimer
from cmae_scale.engine.precision import Choices, Precision, read_precision
from cmae_scale.engine.process.group import RankContext
from cmae_scale.engine.zero.checks import check_memory_plan
from cmae_scale.engine.zero.partition_map import count_elements
from cmae_scale.engine.zero.start import Engine, start_engine
from cmae_scale.layers.attention import use_attention


@dataclass
class TrainState:
    """`first_step` optimizer steps were done when it started. Methods are called by all ranks together."""

    run: Run
    context: RankContext
    engine: Engine
    ema: TargetEma
    attention: Choices
    metadata: CheckpointMetadata
    first_step: int
    timer: StepTimer  # where the time goes, if the run file asks
    notices: list[str] = field(default_factory=list)  # what the user should know
    extra: dict[str, Any] = field(default_factory=dict)  # JSON that belongs to the state, by who keeps it
    snapshot: Snapshot = field(default_factory=Snapshot)  # of what is saved beside training

    @property
    def compute(self) -> torch.dtype:
        """The number format of matrix products."""
        return read_precision(self.run.deepspeed).compute

    def use_attention(self) -> AbstractContextManager[None]:
        """Hold forward and backward passes to the attention kernel of the run file."""
        return use_attention(next(iter(self.attention.values())))  # a named one is that of every part

    def begin_save(
        self, step: int, *, keep_every_steps: int | None = None, is_beside: bool = False
    ) -> PendingSave | str:
        """A checkpoint of `step` steps that is to be committed, or what went wrong: older ones are untouched.

        `is_beside`: it is written while training goes on.
        """
        return begin_save(
            self.engine,
            self.run.out / "checkpoints",
            step=step,
            metadata=self.metadata,
            masters=self.ema.named_masters(),
            averages=self.ema.named_averages(self.engine.module),
            extra=self.extra,
            keeping=Keeping(self.run.settings.checkpoint.keep, keep_every_steps),
            world=self.context.world,
            snapshot=self.snapshot if is_beside else None,
        )

    def restore(self) -> bool:
        """Take up the newest whole checkpoint of the run folder. False when there is none at all."""
        loaded = load_newest(
            self.engine,
            self.run.out / "checkpoints",
            metadata=self.metadata,
            masters=self.ema.named_masters(),
            averages=self.ema.named_averages(self.engine.module),
            changes_allowed=self.run.settings.checkpoint.resume == "anyway",
            world=self.context.world,
        )
        if loaded is None:
            return False
        self.ema.sync_()
        self.first_step, self.extra = loaded.step, loaded.extra
        self.notices += loaded.notices
        return True


def start_train_state(
    run: Run,
    *,
    context: RankContext,
    model: nn.Module,
    pairs: Sequence[Pair],
    attention: Choices,
    metadata: CheckpointMetadata,
    groups: list[dict[str, Any]] | None = None,
    notices: Sequence[str] = (),
) -> TrainState:
    """Everything of the run on this rank, at the newest checkpoint in the run folder or at step 0.

    `run` is resolved; `pairs` are the parameters that follow others as a moving average; `metadata` says
    which checkpoints continue this run; `groups` are the optimizer's, where pre-training's are not meant.
    Raises ConfigError when the run folder cannot be written, or holds states of another kind of run.
    """
    _open_folder(run, context)
    check_memory_plan(run.deepspeed, device=context.device.type, has_target=bool(pairs))
    engine = start_engine(model, run, groups=groups)
    state = TrainState(
        run=run,
        context=context,
        engine=engine,
        # an average outside of the model is in no state but as these masters
        ema=TargetEma(
            pairs,
            keep_master=groups is not None or read_precision(run.deepspeed).needs_master,
            device=context.device,
        ),
        attention=attention,
        metadata=metadata,
        first_step=0,
        timer=StepTimer(context.device, is_on=run.settings.monitor.breakdown),
        notices=list(notices),
    )
    resume = run.settings.checkpoint.resume
    if resume != "never" and not state.restore() and resume == "required":
        raise ConfigError(
            f"{run.out / 'checkpoints'} holds no checkpoint to go on from: name the run's folder with --out, "
            f"or start anew with --set {run.kind}.checkpoint.resume=auto"
        )
    return state


def name_precision(precision: Precision) -> str:
    """For instance "bfloat16 products, float32 weights"."""
    compute, weights = (
        str(dtype).removeprefix("torch.") for dtype in (precision.compute, precision.parameters)
    )
    return f"{compute} products, {weights} weights"


def count_trainable(module: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has split them."""
    return sum(count_elements(p) for p in module.parameters() if p.requires_grad)


def _open_folder(run: Run, context: RankContext) -> None:
    """Write the resolved run file; where that fails, all ranks say so."""
    failed = None
    if context.world.is_first:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            write_settings(run.out / "config.json", dump_run(run))
        except OSError as error:
            failed = str(error)
    if failed := gather_objects(failed)[0]:
        raise ConfigError(f"cannot write into the run folder {run.out} ({failed}): choose another with --out")
