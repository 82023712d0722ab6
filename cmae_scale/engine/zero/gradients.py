"""Norms of the gradients of a model's parts, wherever ZeRO keeps them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import safe_get_local_grad
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.core.collectives import sum_of_ranks, world_size
from cmae_scale.core.world import read_world
from cmae_scale.engine.zero.partitions import own_elements

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
