"""What of a parameter and its gradient lives on this rank, whatever ZeRO made of it, and the whole of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_grad
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.core.collectives import sum_of_ranks, world_size
from cmae_scale.core.world import read_world


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has split `parameter` over the ranks."""
    return hasattr(parameter, "ds_tensor")


def partition_of(parameter: nn.Parameter) -> Tensor:
    """The elements of `parameter` that live on this rank: all of them below ZeRO-3."""
    shard: Any = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data


class Master(NamedTuple):
    """fp32 values behind a parameter: its elements from `start` on, as far as this rank has them.

    `is_shared`: every rank has the same. Under ZeRO-3 they are laid out as `partition_of(parameter)`.
    """

    values: Tensor
    start: int = 0
    is_shared: bool = True


def master_of(parameter: nn.Parameter) -> Master:
    """The fp32 values of `parameter` where the optimizer keeps them, without asking another rank.

    That is the CPU when ZeRO has its optimizer there; DeepSpeed's own call would copy them to the GPU.
    """
    shard = partition_of(parameter)
    if is_partitioned(parameter):
        return Master(_stage_3_master(parameter, shard), is_shared=False)
    if not parameter.requires_grad:
        return Master(shard.float())
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        mapping: Any = parameter._hp_mapping
        if mapping is None:
            return Master(shard.new_empty(0, dtype=torch.float32), is_shared=False)
        return Master(mapping.hp_fragment.detach(), mapping.lp_fragment_address.start, is_shared=False)
    whole = safe_get_full_fp32_param(parameter)
    return Master(shard.float() if whole is None else whole.reshape(shard.shape))


def _stage_3_master(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    if not parameter.requires_grad:
        return shard.float()
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
    if not is_partitioned(parameter):
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


@torch.no_grad()
def gather_weights(module: nn.Module, *, is_kept: bool = True) -> dict[str, Tensor]:
    """state_dict of `module` in fp32 on the CPU; every rank must call it, those that keep it get the same.

    One that does not keep it takes part for the others, and gets nothing. Weights that the engine rounded to
    bf16 or fp16 come from its fp32 masters. So do those that ZeRO-3 keeps whole, because autocast renews them
    in bf16.
    """
    state = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            whole = _whole(value, is_kept=is_kept)
        else:
            whole = value.detach().cpu().clone() if is_kept else None
        if whole is not None:
            state[name] = whole
    return state


def _whole(parameter: nn.Parameter, *, is_kept: bool) -> Tensor | None:
    def copy(values: Tensor) -> Tensor | None:
        return values.detach().to("cpu", torch.float32, copy=True) if is_kept else None

    is_kept_whole = parameter.requires_grad and getattr(parameter, "ds_persist", False)
    if parameter.dtype is not torch.float32 or is_kept_whole:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return copy(master.reshape(_shape(parameter)))
    if is_partitioned(parameter):
        with deepspeed.zero.GatheredParameters([parameter]):
            return copy(parameter)
    return copy(parameter)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


Parts = Mapping[str, Sequence[nn.Parameter]]


def measure_gradients(engine: Any, parts: Parts) -> Float[Tensor, " parts"]:
    """L2 norms of the gradients of each part, over all ranks, before clipping and without loss scale.

    To be called by all ranks between the backward pass of a step's last micro-batch and `engine.step()`.
    Each rank squares what it holds, and one sum of a few numbers over ranks does the rest.
    """
    device = next(parameter.device for part in parts.values() for parameter in part)
    is_first = read_world().is_first
    squares = []
    for part in parts.values():
        held = [gradient for parameter in part for gradient in _own_gradient(parameter, is_first=is_first)]
        norms = torch._foreach_norm(held) if held else []
        squares.append(
            sum((norm.float().to(device).square() for norm in norms), torch.zeros((), device=device))
        )
    return sum_of_ranks(torch.stack(squares)).sqrt() / _loss_scale(engine)


def _own_gradient(parameter: nn.Parameter, *, is_first: bool) -> list[Tensor]:
    """The elements of its gradient that this rank answers for: together all ranks have each of them once."""
    if hasattr(parameter, "ds_id"):
        return [own_elements(parameter, safe_get_local_grad(parameter))]
    if hasattr(parameter, "_hp_mapping"):
        return _fragment(parameter)
    whole_here = is_first or world_size() == 1
    return [parameter.grad.flatten()] if whole_here and parameter.grad is not None else []


def _fragment(parameter: Any) -> list[Tensor]:
    """The part of a gradient that belongs to this rank's partition of ZeRO 1 or 2."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return []
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    own = mapping.lp_fragment_address
    if gradient.numel() != own.numel:  # the bf16 optimizer of stage 1 keeps whole gradients on every rank
        gradient = gradient.narrow(0, own.start, own.numel)
    return [gradient]


def _loss_scale(engine: Any) -> float:
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is not None:
        return float(scaler.get_scale())
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
