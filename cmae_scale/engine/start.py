"""Starting: the process group, this rank's device, and the DeepSpeed engine of a run."""

import logging
import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn

from cmae_scale.core.config import Run
from cmae_scale.core.errors import ConfigError, UserError
from cmae_scale.core.precision import read_formats
from cmae_scale.core.world import World, read_world
from cmae_scale.engine.compiled import compile_blocks_
from cmae_scale.engine.optim import build_lars, weight_decay_groups
from cmae_scale.engine.remat import adapt_settings, choose_block_runner
from cmae_scale.engine.safety.pulse import Pulse
from cmae_scale.engine.safety.signals import StopRequest
from cmae_scale.engine.watch.monitors import without_monitors

Engine = Any  # deepspeed.DeepSpeedEngine, which ships no types

# DeepSpeed's compiled shared-memory all-reduce serves tensor-parallel inference. Training does not need it,
# and building it would cost minutes and a C++ compiler at the first start on a CPU.
_UNUSED_OP = "deepspeed_shm_comm"

# what DeepSpeed calls the sections of a ds_config in its own complaints
_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "TensorBoardConfig": "tensorboard",
    "WandbConfig": "wandb",
    "CSVConfig": "csv_monitor",
}


class PeerMissingError(UserError):
    """Not all ranks came together."""

    exit_status = 1


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
    """Join the process group that the launcher prepared (or a group of one) and take this rank's device.

    On a CPU, gloo; the machine's cores are shared out among its ranks unless OMP_NUM_THREADS says otherwise.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        _prepare_lone_process()
    accelerator = get_accelerator()
    world = read_world()
    if accelerator.device_name() == "cpu":
        _share_cores(world)
    else:
        accelerator.set_device(world.local_rank)
    deepspeed.ops.__compatible_ops__[_UNUSED_OP] = False
    on_cpu = accelerator.device_name() == "cpu"
    try:
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )
    except torch.distributed.DistError as error:
        raise PeerMissingError(
            f"rank {world.rank} waited {timeout_s:.0f} s for all {world.size} ranks to come to "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({_first_line(error)}): look "
            "for one that did not start, or for a firewall"
        ) from None
    device = torch.device(accelerator.device_name(world.local_rank))
    return Place(world=world, device=device, stop=stop or StopRequest())


def stop_processes() -> None:
    """Leave the process group, so that the interpreter ends without warnings."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def read_precision(settings: dict[str, Any]) -> Precision:
    """The number formats that a ds_config asks for."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    formats = read_formats(settings)
    return Precision(dtypes[formats.compute], dtypes[formats.parameters])


def start_engine(model: nn.Module, run: Run, *, groups: list[dict[str, Any]] | None = None) -> Engine:
    """The DeepSpeed engine for `model` as the run file says.

    Without `groups`, the model is pre-training's: weight decay where the method has it, blocks run as its
    settings say. `run` is resolved (no "auto" left). Raises ConfigError for what DeepSpeed refuses.
    """
    settings, optimizer = run.deepspeed, None
    if groups is None:
        settings = adapt_settings(run.cmae.model.remat, settings=run.deepspeed)
        decay = settings.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
        groups = weight_decay_groups(model, weight_decay=decay)
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


def _prepare_lone_process() -> None:
    """Set what a launcher would have set: without it DeepSpeed looks for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def _share_cores(world: World) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world.size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_this_machine))
