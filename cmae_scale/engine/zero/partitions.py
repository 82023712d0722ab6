"""What of a parameter lives on this rank, whatever ZeRO made of it."""

from collections.abc import Iterable
from typing import Any

from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def partition_of(parameter: nn.Parameter) -> Tensor:
    """The elements of `parameter` that live on this rank: all of them below ZeRO-3."""
    shard: Any = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data


def master_of(parameter: nn.Parameter) -> Tensor:
    """The fp32 values behind the elements of `partition_of(parameter)`, where the optimizer keeps them.

    That is the CPU when ZeRO-3 has its optimizer there; DeepSpeed's own call would copy them to the GPU.
    """
    shard = partition_of(parameter)
    if not parameter.requires_grad:
        return shard.float()
    if not hasattr(parameter, "ds_tensor"):
        whole = safe_get_full_fp32_param(parameter)
        return shard.float() if whole is None else whole.reshape(shard.shape)
    optimizer: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
    local: Tensor
    local, group = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
    if optimizer._swappable_optimizer_subgroup(group):  # on NVMe: the buffer is needed for the next parameter
        local = local.clone()
        optimizer._release_swap_buffers(group)
    return local.reshape(shard.shape).float()


def own_elements(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """`shard`, laid out as `partition_of(parameter)`, without the padding that ends the last rank's.

    ZeRO-3 cuts every parameter into equal parts; what fills up the last one is whatever was in memory.
    """
    if not hasattr(parameter, "ds_tensor"):
        return shard
    begin = parameter.ds_zero_partition_rank * shard.numel()  # type: ignore[attr-defined]
    kept = min(shard.numel(), max(0, parameter.ds_numel - begin))  # type: ignore[attr-defined]
    return shard.flatten()[:kept]


def drop_node_copies_(frozen: Iterable[nn.Parameter]) -> None:
    """Have ZeRO++ copy frozen parameters that have changed anew within each node (zero_hpz_partition_size).

    It renews its second copy of trained parameters after every update, but keeps that of frozen ones for
    ever: the target's forward pass would stay at the weights of the start.
    """
    for parameter in frozen:
        if hasattr(parameter, "ds_secondary_tensor"):
            parameter.ds_secondary_tensor = None
