"""What a checkpoint holds, taken from a running engine and put back into one of another topology.

Tensors are named "KIND/PARAMETER@START": the elements of a parameter from START on, of its weight, of one of
the optimizer's states ("exp_avg", "step", ...), or of its moving "average"; buffers are "buffer/NAME". All
else is a few numbers: `Counters`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cmae_scale.checkpoints.files import CheckpointReader
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.zero.partition_map import ParamPartition, spread_weights

Counters = dict[str, Any]  # JSON values

BUFFER = "buffer"
# of DeepSpeed's loss scalers, which differ by stage but share these. Source: runtime/fp16/loss_scaler.py
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def read_content(
    engine: Any, partitions: Sequence[ParamPartition], *, rank: int, ranks: int
) -> dict[str, Tensor]:
    """This rank's share of the state, as views of where it lies; what all ranks hold alike is dealt out."""
    states = engine.basic_optimizer.state
    content: dict[str, Tensor] = {}
    for partition in _deal(partitions, rank=rank, ranks=ranks):
        suffix = f"{partition.name}@{partition.start}"
        content[f"{partition.kind}/{suffix}"] = partition.of(partition.holder)
        for kind, value in states.get(partition.holder, {}).items():
            if value is not None:
                content[f"{kind}/{suffix}"] = _read_state(value, partition, kind=kind)
    if rank == 0:
        for name, buffer in engine.module.named_buffers():
            content[f"{BUFFER}/{name}"] = buffer.detach().contiguous()
    return content


@torch.no_grad()
def write_content(engine: Any, partitions: Sequence[ParamPartition], *, state: CheckpointReader) -> None:
    """Put `state` into the engine, in place. All ranks together."""
    for partition in partitions:
        partition.of(partition.holder).copy_(
            state.read(partition.kind, partition.name, partition.start, partition.stop)
        )
    optimized = _optimized(engine)
    by_holder: dict[int, list[ParamPartition]] = {}
    for partition in partitions:
        if id(partition.holder) in optimized:
            by_holder.setdefault(id(partition.holder), []).append(partition)
    for shared in by_holder.values():
        _write_states(engine.basic_optimizer, shared, state=state)
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(state.read_buffer(name, shape=buffer.shape))
    spread_weights(engine)


def read_counters(engine: Any) -> Counters:
    """The engine's numbers, equal on all ranks."""
    scheduler, scaler = engine.lr_scheduler, _find_scaler(engine)
    grad_scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "lr": [float(group["lr"]) for group in engine.optimizer.param_groups],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "scaler": {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)},
        "grad_scaler": None if grad_scaler is None else grad_scaler.state_dict(),
    }


def write_counters(engine: Any, counters: Counters) -> None:
    """Set the engine's numbers as `read_counters` gave them; those it has no place for are left out."""
    engine.global_steps = counters["global_steps"]
    engine.global_samples = counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    for group, lr in zip(engine.optimizer.param_groups, counters["lr"], strict=False):
        group["lr"] = lr
    if engine.lr_scheduler is not None and counters["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(counters["scheduler"])
    scaler = _find_scaler(engine)
    for name, value in counters["scaler"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    grad_scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if grad_scaler is not None and counters["grad_scaler"]:
        grad_scaler.load_state_dict(counters["grad_scaler"])


def _deal(partitions: Sequence[ParamPartition], *, rank: int, ranks: int) -> Iterator[ParamPartition]:
    """The partitions that `rank` writes: its own, and of the replicated ones an even share by size."""
    loads = [0] * ranks
    for partition in partitions:
        if not partition.is_replicated:
            yield partition
            continue
        writer = loads.index(min(loads))
        loads[writer] += partition.stop - partition.start
        if writer == rank:
            yield partition


def _read_state(value: Any, partition: ParamPartition, *, kind: str) -> Tensor:
    if isinstance(value, Tensor) and value.shape == partition.holder.shape:
        return partition.of(value)
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
        return torch.as_tensor(value, dtype=torch.float64).detach().reshape(())
    raise ConfigError(
        f'optimizer.type: this optimizer keeps a "{kind}" that has not one number per weight, which a '
        "checkpoint cannot hold: use Adam or AdamW, or another optimizer of that kind"
    )


def _write_states(inner: Any, partitions: Sequence[ParamPartition], *, state: CheckpointReader) -> None:
    """All optimizer states of the one holder that `partitions` share; none if it had not taken a step yet."""
    holder = partitions[0].holder
    for kind in state.optimizer_kinds:
        known = [partition for partition in partitions if state.has(kind, partition.name)]
        if not known:
            continue
        first = state.read(kind, known[0].name, known[0].start, known[0].stop)
        if first.dim() == 0:
            inner.state[holder][kind] = _as_counter(inner, holder, float(first))
            continue
        values = torch.zeros_like(holder, dtype=first.dtype, requires_grad=False)
        for partition in known:
            partition.of(values).copy_(state.read(kind, partition.name, partition.start, partition.stop))
        inner.state[holder][kind] = values


def _as_counter(inner: Any, holder: Tensor, value: float) -> Any:
    """A count of steps as the optimizer keeps it: PyTorch's in a tensor, DeepSpeed's as a whole number."""
    if not type(inner).__module__.startswith("torch."):
        return int(value)
    on_device = any(inner.param_groups[0].get(option) for option in ("fused", "capturable"))
    return torch.tensor(value, dtype=torch.float32, device=holder.device if on_device else "cpu")


def _optimized(engine: Any) -> set[int]:
    """ids of the tensors that the optimizer moves."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # stage 3 shows them one at a time
    if flat is not None:
        return {id(tensor) for tensor in flat}
    return {id(tensor) for group in engine.basic_optimizer.param_groups for tensor in group["params"]}


def _find_scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
