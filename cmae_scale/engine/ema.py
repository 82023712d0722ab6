"""The target branch follows the online branch: a moving average on whatever shards a rank holds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cmae_scale.core.collectives import sum_of_ranks
from cmae_scale.engine.zero.partitions import (
    Master,
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
        is_spread = any(not master.is_shared for master in self.masters or [])
        self._buckets = _fill_buckets(self.target) if is_spread and not is_partitioned(self.target[0]) else []

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        """One step of the average; nothing to do for a plain MAE, which has no target."""
        if not self.target:
            return
        if self.masters is None:
            torch._foreach_lerp_(*self._shards(), 1 - momentum)
        else:
            followed = [master_of(p).values for p in self.online]
            torch._foreach_lerp_([master.values for master in self.masters], followed, 1 - momentum)
        self.sync_()

    def named_masters(self) -> dict[str, Master]:
        """The fp32 masters of this rank by parameter name; none where the target itself is fp32."""
        return {} if self.masters is None else dict(zip(self.names, self.masters, strict=True))

    def named_averages(self, module: nn.Module) -> dict[str, Master]:
        """The averages that are no parameters of `module`, by the name of what they follow; in fp32."""
        inside = {id(parameter) for parameter in module.parameters()}
        masters = self.named_masters()
        return {
            name: masters.get(name, Master(target.data))
            for name, target in zip(self.names, self.target, strict=True)
            if id(target) not in inside
        }

    @torch.no_grad()
    def sync_(self) -> None:
        """Have the target's other copies agree with what was written to its masters, or to itself.

        Where ranks have parts of the masters, all call it together, and few large collectives do it.
        """
        if self._buckets:
            for bucket in self._buckets:
                self._spread(bucket)
        elif self.masters:
            values = [master.values for master in self.masters]
            torch._foreach_copy_([partition_of(p) for p in self.target], values)
        drop_node_copies_(self.target)

    @torch.no_grad()
    def measure_distance(self) -> Tensor:
        """|online - target| / |online| of all parameters that are averaged, in fp32, on all ranks.

        Every rank must call it at the same step. Takes the memory of one parameter.
        """
        averages = [partition_of(p) for p in self.target]
        if self.masters is not None:
            averages = [master.values for master in self.masters]
        squares = torch.zeros(2, device=self._device)
        for online, target in zip(self.online, averages, strict=True):
            values = partition_of(online) if self.masters is None else master_of(online).values
            own, followed = own_elements(online, values), own_elements(online, target)
            squares += torch.stack([(own - followed).square().sum(), own.square().sum()]).to(self._device)
        if is_partitioned(self.online[0]) or self._buckets:
            squares = sum_of_ranks(squares)
        return (squares[0] / squares[1]).sqrt()

    def _spread(self, bucket: range) -> None:
        """Bring the parts of some masters together, in the target's own format, on all ranks.

        Every rank writes its parts between zeros: their sum as whole numbers is all parts, to the bit.
        """
        assert self.masters is not None
        targets = [self.target[number].data for number in bucket]
        sizes = [target.numel() for target in targets]
        room = sum(sizes) + sum(sizes) % 2  # of two bytes each: a whole number has four
        device, here = targets[0].device, self.masters[bucket.start].values.device  # the CPU, if offloaded
        flat = torch.zeros(room, dtype=targets[0].dtype, device=here)
        wholes = torch.split(flat[: sum(sizes)], sizes)
        for whole, number in zip(wholes, bucket, strict=True):
            values, start, _ = self.masters[number]
            whole[start : start + values.numel()].copy_(values.flatten())
        summed = sum_of_ranks(flat.to(device).view(torch.int32)).view(flat.dtype)
        parts = zip(torch.split(summed[: sum(sizes)], sizes), targets, strict=True)
        torch._foreach_copy_(targets, [part.view_as(target) for part, target in parts])

    def _shards(self) -> tuple[list[Tensor], list[Tensor]]:
        if not is_partitioned(self.target[0]):
            return list(self.target), list(self.online)
        return [partition_of(p) for p in self.target], [partition_of(p) for p in self.online]


BUCKET_ELEMENTS = 1 << 26  # that are brought together at once: 128 MB in bf16


def _fill_buckets(targets: Sequence[nn.Parameter]) -> list[range]:
    """Neighbouring parameters of one format, as many as BUCKET_ELEMENTS hold."""
    buckets: list[range] = []
    held = 0
    for number, target in enumerate(targets):
        fits = held + target.numel() <= BUCKET_ELEMENTS and buckets
        if fits and target.dtype == targets[number - 1].dtype:
            buckets[-1] = range(buckets[-1].start, number + 1)
            held += target.numel()
        else:
            buckets.append(range(number, number + 1))
            held = target.numel()
    return buckets


def _starting_master(online: nn.Parameter, target: nn.Parameter) -> Master:
    """The fp32 values that the target starts with.

    In a new run it equals the online branch, whose fp32 values were not yet rounded. In a run that starts
    from a whole model's weights it has its own where the two differ.
    """
    master = master_of(online)  # on the CPU where the optimizer is offloaded: then the average is made there
    rounded, online_rounded = (_part_of(parameter, master) for parameter in (target, online))
    values = torch.where(rounded == online_rounded, master.values, rounded.float())
    return master._replace(values=values)


def _part_of(parameter: nn.Parameter, master: Master) -> Tensor:
    """The elements of `parameter` that `master` has, beside it."""
    values = partition_of(parameter)
    if values.shape != master.values.shape:
        values = values.flatten()[master.start : master.start + master.values.numel()]
    return values.to(master.values.device)
