"""The target branch follows the online branch: a moving average on whatever shards a rank holds."""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param
from torch import Tensor, nn

Pair = tuple[str, nn.Parameter, nn.Parameter]  # name, online, target


class TargetEma:
    """target = momentum * target + (1 - momentum) * online, in fp32, after an applied optimizer step.

    The average is elementwise, so under ZeRO-3 each rank averages its own shards and nothing is communicated.
    A model that runs in bf16 or fp16 gets an fp32 master here: a step of 0.004 of the difference is lost in
    the rounding of those formats. Source: paper 3.3; official core/hooks/momentum_update_hook.py.
    """

    def __init__(self, pairs: Sequence[Pair], *, keep_master: bool) -> None:
        self.names = [name for name, _, _ in pairs]
        self.online = [online for _, online, _ in pairs]
        self.target = [target for _, _, target in pairs]
        for name, online, target in pairs:
            assert _shard(online).shape == _shard(target).shape, (
                f"{name}: online and target are split differently"
            )
        both = zip(self.online, self.target, strict=True)
        self.masters = [_starting_master(*pair) for pair in both] if keep_master else None

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        """One step of the average; nothing to do for a plain MAE, which has no target."""
        if not self.target:
            return
        if self.masters is None:
            torch._foreach_lerp_(*self._shards(), 1 - momentum)
        else:
            torch._foreach_lerp_(self.masters, [_master(p) for p in self.online], 1 - momentum)
            torch._foreach_copy_([_shard(p) for p in self.target], self.masters)

    def state(self) -> dict[str, Tensor] | None:
        """The fp32 masters of this rank by name; None when the target itself is fp32 (it is in the model)."""
        return None if self.masters is None else dict(zip(self.names, self.masters, strict=True))

    def load_state(self, state: dict[str, Tensor] | None) -> None:
        """Take back what `state` gave, after the model's weights were loaded."""
        if self.masters is not None:
            assert state is not None, "the checkpoint holds no fp32 masters of the target"
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(state[name])

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        return [_shard(p) for p in self.target], [_shard(p) for p in self.online]


def _shard(parameter: nn.Parameter) -> Tensor:
    """The elements of `parameter` that live on this rank: all of them below ZeRO-3."""
    shard: Any = getattr(parameter, "ds_tensor", None)
    return parameter.data if shard is None else shard.data


def _master(parameter: nn.Parameter) -> Tensor:
    """The fp32 values behind the elements of `_shard(parameter)`."""
    if hasattr(parameter, "ds_tensor"):
        local = safe_get_local_fp32_param(parameter)
    else:
        local = safe_get_full_fp32_param(parameter)
    return _shard(parameter).float() if local is None else local.reshape(_shard(parameter).shape)


def _starting_master(online: nn.Parameter, target: nn.Parameter) -> Tensor:
    """The fp32 values that the target starts with.

    In a new run it equals the online branch, whose fp32 values were not yet rounded. In a run that starts
    from a whole model's weights it has its own where the two differ.
    """
    rounded = _shard(target)
    return torch.where(rounded == _shard(online), _master(online), rounded.float())
