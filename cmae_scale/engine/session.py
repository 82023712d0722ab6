"""A run that is under way: engine, moving average and training states kept in step with each other."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cmae_scale.core.config import Run, dump_run
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_text
from cmae_scale.engine.ema import Pair, TargetEma
from cmae_scale.engine.start import Engine, Place, Precision, read_precision, start_engine
from cmae_scale.engine.states.checkpoint import load_newest, save_state
from cmae_scale.engine.states.stamp import Stamp
from cmae_scale.engine.watch.monitors import settle_monitors
from cmae_scale.layers.attention import AttentionChoice, use_attention


@dataclass
class Session:
    """`first_step` optimizer steps were done when it started. Methods are called by all ranks together."""

    run: Run
    place: Place
    engine: Engine
    ema: TargetEma
    attention: AttentionChoice
    stamp: Stamp
    first_step: int
    notices: list[str] = field(default_factory=list)  # what the user should know

    def use_attention(self) -> AbstractContextManager[None]:
        """Hold forward and backward passes to the attention kernel of the run file."""
        return use_attention(self.attention)

    def save(self, step: int) -> str | None:
        """Commit the state after `step` steps. None, or what went wrong: older states are untouched then."""
        return save_state(
            self.engine,
            self.run.out / "checkpoints",
            step=step,
            stamp=self.stamp,
            target_masters=self.ema.state(),
            keep=self.run.settings.checkpoint.keep,
            world=self.place.world,
        )

    def restore(self) -> bool:
        """Take up the newest whole state of the run folder. False when there is none at all."""
        folder = self.run.out / "checkpoints"
        loaded = load_newest(self.engine, folder, stamp=self.stamp, world=self.place.world)
        if loaded is None:
            return False
        self.first_step = loaded.step
        self.ema.load_state(loaded.target_masters)
        self.notices += [f"warning: {damage}, so an older state was taken" for damage in loaded.passed_over]
        return True


def start_session(
    run: Run,
    *,
    place: Place,
    model: nn.Module,
    pairs: Sequence[Pair],
    attention: AttentionChoice,
    stamp: Stamp,
    groups: list[dict[str, Any]] | None = None,
) -> Session:
    """Everything of the run on this rank, at the newest state in the run folder or at step 0.

    `run` is resolved; `pairs` are the parameters that follow others as a moving average; `stamp` says which
    states continue this run; `groups` are the optimizer's, where pre-training's are not meant.
    Raises ConfigError when the run folder cannot be written, or holds states of
    another kind of run.
    """
    _open_folder(run, place)
    notices = settle_monitors(run.deepspeed)
    engine = start_engine(model, run, groups=groups)
    session = Session(
        run=run,
        place=place,
        engine=engine,
        # an average outside of the model is in no state but as these masters
        ema=TargetEma(pairs, keep_master=groups is not None or read_precision(run.deepspeed).needs_master),
        attention=attention,
        stamp=stamp,
        first_step=0,
        notices=notices,
    )
    if run.settings.checkpoint.resume == "auto":
        session.restore()
    return session


def name_precision(precision: Precision) -> str:
    """For instance "bfloat16 products, float32 weights"."""
    compute, weights = (
        str(dtype).removeprefix("torch.") for dtype in (precision.compute, precision.parameters)
    )
    return f"{compute} products, {weights} weights"


def count_trainable(module: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has split them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)


def _open_folder(run: Run, place: Place) -> None:
    if place.world.is_first:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            write_text(run.out / "config.json", dump_run(run))
        except OSError as error:
            raise ConfigError(
                f"cannot write into the run folder {run.out} ({error}): choose another with --out"
            ) from None
