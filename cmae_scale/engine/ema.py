"""The target branch follows the online branch: a moving average on whatever shards a rank holds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmae_scale.core.collectives import sum_of_ranks
from cmae_scale.engine.zero.partitions import (
    drop_node_copies_,
    is_partitioned,
    master_of,
    own_elements,
    partition_of,
)

Pair = tuple[str, nn.Parameter, nn.Parameter]  # name, online, target


class TargetEma:
    """target = momentum * target + (1 - momentum) * online, in fp32, after an applied optimizer step.

    The average is elementwise, so under ZeRO-3 each rank averages its own shards and nothing is communicated.
    A model that runs in bf16 or fp16 gets an fp32 master here: a step of 0.004 of the difference is lost in
    the rounding of those formats. Source: paper 3.3; official core/hooks/momentum_update_hook.py.
    """

    def __init__(self, pairs: Sequence[Pair], *, keep_master: bool, device: torch.device) -> None:
        self._device = device  # where ranks talk to each other, wherever their shards lie
        self.names = [name for name, _, _ in pairs]
        self.online = [online for _, online, _ in pairs]
        self.target = [target for _, _, target in pairs]
        for name, online, target in pairs:
            assert partition_of(online).shape == partition_of(target).shape, (
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
            torch._foreach_lerp_(self.masters, [master_of(p) for p in self.online], 1 - momentum)
        self.sync_()

    def named_masters(self) -> dict[str, Tensor]:
        """The fp32 masters of this rank by parameter name; none where the target itself is fp32."""
        return {} if self.masters is None else dict(zip(self.names, self.masters, strict=True))

    def named_averages(self, module: nn.Module) -> dict[str, Tensor]:
        """The averages that are no parameters of `module`, by the name of what they follow; in fp32."""
        inside = {id(parameter) for parameter in module.parameters()}
        masters = self.named_masters()
        return {
            name: masters.get(name, target.data)
            for name, target in zip(self.names, self.target, strict=True)
            if id(target) not in inside
        }

    @torch.no_grad()
    def sync_(self) -> None:
        """Have the target's other copies agree with what was written to its masters, or to itself."""
        if self.masters:
            torch._foreach_copy_([partition_of(p) for p in self.target], self.masters)
        drop_node_copies_(self.target)

    @torch.no_grad()
    def measure_distance(self) -> Tensor:
        """|online - target| / |online| of all parameters that are averaged, in fp32, on all ranks.

        Every rank must call it at the same step. Takes the memory of one parameter.
        """
        pairs = list(zip(self.online, self.masters or [partition_of(p) for p in self.target], strict=True))
        squares = torch.zeros(2, device=self._device)
        for online, target in pairs:
            values = partition_of(online) if self.masters is None else master_of(online)
            own, followed = own_elements(online, values), own_elements(online, target)
            squares += torch.stack([(own - followed).square().sum(), own.square().sum()]).to(self._device)
        if is_partitioned(self.online[0]):
            squares = sum_of_ranks(squares)
        return (squares[0] / squares[1]).sqrt()

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        return [partition_of(p) for p in self.target], [partition_of(p) for p in self.online]


def _starting_master(online: nn.Parameter, target: nn.Parameter) -> Tensor:
    """The fp32 values that the target starts with.

    In a new run it equals the online branch, whose fp32 values were not yet rounded. In a run that starts
    from a whole model's weights it has its own where the two differ.
    """
    master = master_of(online)  # on the CPU where the optimizer is offloaded: then the average is made there
    rounded, online_rounded = (partition_of(parameter).to(master.device) for parameter in (target, online))
    return torch.where(rounded == online_rounded, master, rounded.float())
