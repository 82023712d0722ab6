"""Starting: the process group, this rank's device, and the DeepSpeed engine of a run."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from pydantic import ValidationError
from torch import nn

from cmae_scale.core.config import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.precision import FormatName, read_formats
from cmae_scale.core.world import World, read_world
from cmae_scale.engine.compiled import compile_blocks_
from cmae_scale.engine.cores import settle_threads
from cmae_scale.engine.devices import take_device
from cmae_scale.engine.group import join_group, settle_environment
from cmae_scale.engine.optim import build_lars, weight_decay_groups
from cmae_scale.engine.remat import adapt_settings, choose_block_runner
from cmae_scale.engine.safety.pulse import Pulse
from cmae_scale.engine.safety.signals import StopRequest
from cmae_scale.engine.watch.monitors import without_monitors

DTYPES: Mapping[FormatName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Engine = Any  # deepspeed.DeepSpeedEngine, which ships no types

# what DeepSpeed calls the sections of a ds_config in its own complaints
_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "TensorBoardConfig": "tensorboard",
    "WandbConfig": "wandb",
    "CSVConfig": "csv_monitor",
}


@dataclass(frozen=True)
class Place:
    """Where this process computes, what it is doing, and whether it was asked to leave."""

    world: World
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse)
    stop: StopRequest = field(default_factory=StopRequest)


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of matrix products; `parameters` that of the weights the model runs on."""

    compute: torch.dtype
    parameters: torch.dtype

    @property
    def needs_master(self) -> bool:
        """Whether the weights the model runs on are too coarse for an EMA (facts: 0.996 stalls in bf16)."""
        return self.parameters is not torch.float32


def start_processes(*, timeout_s: float = 600.0, stop: StopRequest | None = None) -> Place:
    """This rank's place in the group that a launcher or `srun` prepared, or in a group of one.

    The processors of a machine are shared out among its ranks, unless OMP_NUM_THREADS is the user's own.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settle_environment()
    world = read_world()
    device = take_device(world)
    join_group(world, device, timeout_s=timeout_s)
    settle_threads()
    return Place(world=world, device=device, stop=stop or StopRequest())


def stop_processes() -> None:
    """Leave the process group, so that the interpreter ends without warnings."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def read_precision(settings: dict[str, Any]) -> Precision:
    """The number formats that a ds_config asks for."""
    formats = read_formats(settings)
    return Precision(DTYPES[formats.compute], DTYPES[formats.parameters])


def start_engine(model: nn.Module, run: Run, *, groups: list[dict[str, Any]] | None = None) -> Engine:
    """The DeepSpeed engine for `model` as the run file says.

    Without `groups`, the model is pre-training's: weight decay where the method has it, blocks run as its
    settings say. `run` is resolved (no "auto" left). Raises ConfigError for what DeepSpeed refuses.
    """
    settings, optimizer = run.deepspeed, None
    if groups is None:
        settings = adapt_settings(run.cmae.model.remat, settings=run.deepspeed)
        decay = settings.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
        groups = weight_decay_groups(model, weight_decay=decay, decay_tokens=run.cmae.decay_tokens)
        if run.cmae.compile == "blocks":
            compile_blocks_(model, remat=run.cmae.model.remat, settings=settings)
        model.set_remat_(choose_block_runner(run.cmae.model.remat, settings=settings))  # type: ignore[operator]
    elif "activation_checkpointing" in settings:
        raise ConfigError(
            f"{run.path}: write transfer.encoder.remat=full instead of activation_checkpointing"
        )
    if str(settings.get("optimizer", {}).get("type", "")).lower() == "lars":
        optimizer = build_lars(groups, settings=settings)
        settings = {name: value for name, value in settings.items() if name != "optimizer"}
    check_settings(settings, run)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=optimizer,
            config=without_monitors(settings),
        )
    except (TypeError, ValueError, AttributeError, AssertionError, ValidationError) as error:
        raise ConfigError(f"{run.path}: DeepSpeed refuses these settings: {_first_line(error)}") from error
    _forget_rehearsal(engine)
    _scale_loss_by_step(engine)
    _split_frozen(engine)
    _tell_skipped_steps(engine)
    return engine


def _forget_rehearsal(engine: Engine) -> None:
    """Clear the optimizer's state before the first step.

    To allocate it, DeepSpeed's bf16 and fp16 optimizers of stage 0 take a step with zero gradients, and Adam
    counts it: the first real update would be half as long. The other stages clear it themselves.
    """
    inner = getattr(engine.optimizer, "optimizer", None)
    if inner is not None:
        inner.state.clear()


def _scale_loss_by_step(engine: Engine) -> None:
    """Have ZeRO lower the loss scale of fp16 autocast when a step overflows, as its fp16 engine does.

    It is torch's GradScaler otherwise, which ZeRO asks only after it has dropped the steps that overflow: the
    scale never falls, so all later ones overflow too, and the norm by which it clips is multiplied by it.
    """
    optimizer = engine.optimizer
    if getattr(optimizer, "torch_autocast_gradscaler", None) is not None:
        optimizer.torch_autocast_gradscaler = None
        # Source: the defaults of DeepSpeed's fp16 section, runtime/precision_config.py
        optimizer.loss_scaler = DynamicLossScaler(
            init_scale=2**16, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
        )
        optimizer.dynamic_loss_scale = True


def _tell_skipped_steps(engine: Engine) -> None:
    """Have `engine.was_step_applied()` be true only where it is, with fp16 autocast at stage 0.

    There torch's GradScaler leaves out the update of a step that overflows, and DeepSpeed, which asks
    `optimizer.overflow`, does not hear of it: the moving average would go on without the weights.
    """
    scaler, optimizer = engine.torch_autocast_z0_gradscaler, engine.optimizer
    if scaler is None:
        return
    take_step = scaler.step

    def step(inner: Any) -> Any:
        optimizer.overflow = True
        return take_step(inner)

    def note_update(*args: Any) -> None:
        optimizer.overflow = False

    scaler.step = step
    optimizer.register_step_post_hook(note_update)


def _split_frozen(engine: Engine) -> None:
    """Have no whole copies of frozen parameters beside their shards.

    ZeRO-3 keeps small parameters whole and renews those copies in its optimizer step, rounded where autocast
    communicates in bf16. The target moves after that step, shard by shard: a whole copy would lag behind.
    """
    kept_whole = getattr(engine.optimizer, "persistent_parameters", [])
    for parameter in kept_whole:
        if not parameter.requires_grad:
            parameter.ds_persist = False
            parameter.partition()
    kept_whole[:] = [parameter for parameter in kept_whole if parameter.requires_grad]


def check_settings(settings: dict[str, Any], run: Run) -> None:
    """Let DeepSpeed read the config before anything is built, and say its complaint in one sentence."""
    try:
        DeepSpeedConfig(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join([_SECTIONS.get(error.title, error.title), *(str(part) for part in first["loc"])])
        raise ConfigError(f"{run.path}: DeepSpeed refuses {place}: {first['msg']}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AssertionError,
        deepspeed.runtime.config.DeepSpeedConfigError,
    ) as error:
        raise ConfigError(f"{run.path}: DeepSpeed refuses these settings: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
