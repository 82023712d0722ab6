"""What DeepSpeed does otherwise than a run needs, mended or used otherwise; each with its reason."""

import math
from typing import Any

import deepspeed
import torch
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import nn

from cmae_scale.core.collectives import world_size

Engine = Any  # deepspeed.DeepSpeedEngine, which ships no types


def mend_engine_(engine: Engine) -> None:
    """All of it, before the first step."""
    _forget_rehearsal(engine)
    _scale_loss_by_step(engine)
    _split_frozen(engine)
    _tell_skipped_steps(engine)
    _keep_to_itself(engine)


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


def _keep_to_itself(engine: Engine) -> None:
    """Have a lone rank without ZeRO not copy its gradients into buckets and back for nobody.

    Of ViT-L that is two passes over 1.4 GB in every step. Parameters without a gradient get one of zeros, as
    among several ranks.
    """
    if world_size() > 1 or engine.zero_optimization_stage() > 0:
        return
    trained = _list_trained(engine)

    def fill(**_: Any) -> None:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    engine.buffered_allreduce_fallback = fill


def _list_trained(engine: Engine) -> list[nn.Parameter]:
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def skip_unused_op() -> None:
    """Have DeepSpeed not compile its shared-memory all-reduce; before its process group is started.

    It serves tensor-parallel inference. Training does not need it, and building it would cost minutes and a
    C++ compiler at the first start on a CPU.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class CheckedUpdate:
    """`engine.step()` that leaves out every update whose gradient is not finite, at any ZeRO stage.

    DeepSpeed looks at the norm of the whole gradient before it updates, on all ranks alike, and drops a step
    whose norm is not finite (ZeRO 1-3 and bf16). Plain fp32 at stage 0 gets the same check in PlainUpdate.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        optimizer = engine.optimizer
        self.scales_loss = bool(
            engine.fp16_enabled()
            or engine.torch_autocast_z0_gradscaler
            or getattr(optimizer, "dynamic_loss_scale", False)  # fp16 autocast under ZeRO
        )
        if hasattr(optimizer, "check_grad_overflow") and engine.bfloat16_enabled():
            optimizer.check_grad_overflow = True  # a run file could have told it not to
        if not getattr(optimizer, "compute_grad_norm", True):
            optimizer.check_grad_overflow = True
        # a plain torch optimizer, at stage 0 in fp32; under fp16 autocast torch's own scaler looks
        if not hasattr(optimizer, "overflow") and engine.torch_autocast_z0_gradscaler is None:
            PlainUpdate(engine)

    def step(self) -> bool:
        """Update by the gradients that are there. Whether the weights moved."""
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def pass_over(self) -> None:
        """Tell the norm of a step that is left out from the start as that of one that was not finite."""
        self._engine._global_grad_norm = math.inf

    @torch.no_grad()
    def gather_whole_(self) -> None:
        """After a step that was left out: have the parameters whole again that ZeRO-3 keeps whole.

        It has split them, and gathers them again only after an update.
        """
        if whole := getattr(self._engine.optimizer, "persistent_parameters", []):
            whole[0].all_gather(whole)


class PlainUpdate:
    """What an engine at stage 0 in fp32 does with torch's optimizer, where DeepSpeed would not look first.

    A GPU waits for its host from the moment that the host asks for the norm until the next kernels arrive. So
    nothing that takes long comes in between: a fused optimizer is launched before, and leaves all as it was
    if the norm is not finite; the parameters are listed once, not by three walks through the modules (12 ms
    for ViT-L, of a step of 105). Source: DeepSpeed 0.19.8, `_take_model_step`, which updates with whatever
    gradient it has; torch.optim.Optimizer's `found_inf`, which GradScaler sets.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._trained = _list_trained(engine)
        self._take = self._optimizer.step
        self._optimizer.step = self.step
        self._optimizer.overflow = False  # asked of every optimizer that has it
        engine.zero_grad = self.zero_grad
        engine.clip_fp32_gradients = lambda: None  # see step

    def step(self) -> None:
        """The update, clipped, if the norm is finite."""
        gradients = [p.grad for p in self._trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if (limit := self._engine.gradient_clipping()) > 0:
            nn.utils.clip_grads_with_norm_(self._trained, limit, norm)
        is_fused = all(group.get("fused") for group in self._optimizer.param_groups)
        if is_fused:
            self._optimizer.found_inf = (~norm.isfinite()).float()
            self._take()
        value = float(norm)  # the host waits here
        self._engine._global_grad_norm = value
        self._optimizer.overflow = not math.isfinite(value)
        if not (is_fused or self._optimizer.overflow):
            self._take()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self._trained:
            parameter.grad = None


SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")  # of a ds_config


def without_monitors(settings: dict[str, Any]) -> dict[str, Any]:
    """The ds_config for the engine: its own use of the monitors is off, and so is its clock.

    From the third step on its throughput timer has the host wait for the GPU when a forward pass begins and
    when a micro-batch ends, for a figure that nobody reads here. What a run file says of it stays.
    """
    kept = {name: value for name, value in settings.items() if name not in SECTIONS}
    return {"timers": {"throughput": {"enabled": False}}, **kept}


def open_monitor(name: str, section: dict[str, Any]) -> Any:
    """The monitor of one section, whose `write_events` takes what is logged."""
    return MonitorMaster(get_monitor_config({name: section}))
