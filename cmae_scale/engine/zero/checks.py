"""What DeepSpeed's memory settings need, told before anything is built instead of ignored or half-way."""

from collections.abc import Mapping
from typing import Any

from cmae_scale.core.errors import ConfigError

_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def check_memory_plan(settings: Mapping[str, Any], *, device: str, has_target: bool) -> None:
    """Raise ConfigError for a plan that cannot work on `device` ("cpu", "cuda"), or that DeepSpeed ignores.

    `settings` are DeepSpeed's keys; `has_target` says that frozen parameters follow trained ones.
    """
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if settings.get("fp16", {}).get("enabled", False) and stage == 0:
        raise ConfigError(
            "fp16 without ZeRO: DeepSpeed divides the gradients by a loss scale that it never multiplied the "
            "loss by: write zero_optimization.stage=1"
        )
    _check_offload(zero, stage=stage)
    _check_quantized(zero, stage=stage, device=device, has_target=has_target)
    if _target_of(zero, "offload_optimizer") != "none":
        _check_cpu_optimizer(settings)


def _check_offload(zero: Mapping[str, Any], *, stage: int) -> None:
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        target = _target_of(zero, name)
        lowest = 3 if target == "nvme" else lowest
        if target == "none":
            continue
        if stage < lowest:
            raise ConfigError(
                f'zero_optimization.{name} to "{target}" does nothing at ZeRO stage {stage}: write '
                f"zero_optimization.stage={lowest}, or drop it"
            )
        if target == "nvme" and not zero[name].get("nvme_path"):
            raise ConfigError(
                f"zero_optimization.{name}.nvme_path is missing: write a folder on the NVMe disk"
            )
        if target == "nvme" and not _has_async_io():
            raise ConfigError(
                f'zero_optimization.{name} to "nvme" needs DeepSpeed\'s async_io, which does not build here: '
                'install libaio (apt-get install libaio-dev) and a C++ compiler, or write "device": "cpu"'
            )


def _check_quantized(zero: Mapping[str, Any], *, stage: int, device: str, has_target: bool) -> None:
    asked = [name for name in _QUANTIZED if zero.get(name, False)]
    if asked and device == "cpu":
        raise ConfigError(
            f"zero_optimization.{asked[0]} needs a GPU: DeepSpeed has no quantiser for the CPU; drop it"
        )
    if zero.get("zero_hpz_partition_size", 1) > 1:
        asked.append("zero_hpz_partition_size")
    if asked and stage < 3:
        raise ConfigError(
            f"zero_optimization.{asked[0]} does nothing at ZeRO stage {stage}: write "
            "zero_optimization.stage=3, or drop it"
        )
    if has_target and "zero_quantized_nontrainable_weights" in asked:
        raise ConfigError(
            "zero_optimization.zero_quantized_nontrainable_weights keeps the target in 8 bits, where an "
            "average stands still: drop it (zero_quantized_weights has what it saves in communication)"
        )


def _check_cpu_optimizer(settings: Mapping[str, Any]) -> None:
    """DeepSpeed's own Adam for the CPU is compiled at the first start; torch's needs no compiler."""
    optimizer = settings.get("optimizer", {})
    is_adam = str(optimizer.get("type", "")).lower() in ("adam", "adamw")
    if not is_adam or optimizer.get("params", {}).get("torch_adam", False):
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler may do
        raise ConfigError(
            "zero_optimization.offload_optimizer: DeepSpeed's CPUAdam cannot be compiled here "
            f"({type(error).__name__}): write optimizer.params.torch_adam=true optimizer.params.fused=true, "
            "as fast without a compiler"
        ) from error


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        return bool(AsyncIOBuilder().is_compatible())
    except Exception:  # whatever a compiler may do
        return False


def _target_of(zero: Mapping[str, Any], name: str) -> str:
    """Where `name` is offloaded to: "none", "cpu" or "nvme"."""
    section = zero.get(name) or {}
    return str(section.get("device", "none") or "none")
