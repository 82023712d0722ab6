"""What DeepSpeed's engines do otherwise than a run needs, mended on a new engine; each with its reason."""

from typing import Any

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

Engine = Any  # deepspeed.DeepSpeedEngine, which ships no types


def mend_engine_(engine: Engine) -> None:
    """All of it, before the first step."""
    _forget_rehearsal(engine)
    _scale_loss_by_step(engine)
    _split_frozen(engine)
    _tell_skipped_steps(engine)


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
