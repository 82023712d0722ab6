"""The trained weights as plain tensors, whatever ZeRO has split and whatever type the engine runs in."""

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


@torch.no_grad()
def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """state_dict of `module` in fp32 on the CPU, equal on all ranks; every rank must call it.

    Weights that the engine rounded to bf16 or fp16 come from its fp32 masters. So do those that ZeRO-3 keeps
    whole, because autocast renews them in bf16.
    """
    state = {name: buffer.detach().cpu().clone() for name, buffer in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        state[name] = _whole(parameter)
    return state


def _whole(parameter: nn.Parameter) -> Tensor:
    is_kept_whole = parameter.requires_grad and getattr(parameter, "ds_persist", False)
    if parameter.dtype is not torch.float32 or is_kept_whole:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return _copy(master.reshape(_shape(parameter)))
    if hasattr(parameter, "ds_tensor"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return _copy(parameter)
    return _copy(parameter)


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32, copy=True)


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
