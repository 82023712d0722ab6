"""Where the elements of every parameter live on this rank, whatever ZeRO stage and number format runs.

What an optimizer moves is a flat fp32 tensor that holds many parameters, or parts of them, one after the
other; which ones, each DeepSpeed optimizer says in its own way. Here they all become `ParamPartition`s. A
checkpoint is nothing but those of all ranks, so any other way of partitioning can take it up.
Source: DeepSpeed 0.19.8, runtime/zero/{stage_1_and_2,stage3}.py, runtime/bf16_optimizer.py, runtime/fp16/.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cmae_scale.engine.zero.partitions import Master


@dataclass(frozen=True)
class ParamPartition:
    """Elements `start` to `stop` of the parameter `name`, flattened: in `holder` they begin at `offset`.

    `holder` is what the optimizer updates (or the moving average, or nobody). `is_replicated`: every rank
    holds the same. `kind` tells a parameter's own values from a moving average of them beside the model.
    """

    name: str
    start: int
    stop: int
    holder: Tensor
    offset: int
    is_replicated: bool
    kind: Literal["weight", "average"] = "weight"

    def of(self, tensor: Tensor) -> Tensor:
        """A view of its elements in `tensor`, which is the holder or an optimizer state of that shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.stop - self.start]


class _Home(NamedTuple):
    """A parameter's elements on this rank before they have a name."""

    holder: Tensor
    offset: int
    start: int
    length: int
    is_replicated: bool


def list_partitions(
    engine: Any, *, masters: Mapping[str, Master], averages: Mapping[str, Master]
) -> list[ParamPartition]:
    """The partitions of all parameters on this rank; `masters` are fp32 values of frozen ones, by name.

    `averages` are moving averages beside the model, by the name of what they follow.
    A rank that holds nothing of a parameter has no partition of it. Trainable ones come first.
    """
    optimizer = engine.optimizer
    unsplit = dict(_list_unsplit_masters(optimizer))
    parameters = sorted(engine.module.named_parameters(), key=lambda named: not named[1].requires_grad)
    partitions = []
    for name, parameter in parameters:
        home: _Home | None
        if hasattr(parameter, "ds_tensor"):
            home = _find_in_stage_3(parameter, optimizer, masters.get(name))
        elif parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            home = _find_in_stages_1_and_2(parameter, optimizer)
        elif parameter.requires_grad:
            holder, offset = unsplit.get(id(parameter), (parameter, 0))
            home = _Home(holder, offset, 0, parameter.numel(), is_replicated=True)
        else:
            values, start, is_shared = masters.get(name, Master(parameter))
            home = _Home(values, 0, start, values.numel(), is_shared)
        stop = min(home.start + home.length, count_elements(parameter)) if home else 0
        if home and stop > home.start:
            partitions.append(
                ParamPartition(name, home.start, stop, home.holder, home.offset, home.is_replicated)
            )
    return partitions + [
        ParamPartition(name, start, start + values.numel(), values, 0, is_shared, kind="average")
        for name, (values, start, is_shared) in averages.items()
        if values.numel()
    ]


def count_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, also where this rank holds a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _find_in_stage_3(parameter: Any, optimizer: Any, master: Master | None) -> _Home:
    """Every rank holds one equal share; the last ones are padded beyond the parameter's end."""
    if parameter.requires_grad:
        group, offset, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        holder = optimizer.fp32_partitioned_groups_flat[group]
    else:
        holder, offset = parameter.ds_tensor if master is None else master.values, 0
        count = holder.numel()
    rank = optimizer._get_param_partition_rank(parameter)
    start = min(rank * count, count_elements(parameter))
    return _Home(holder, offset, start, count, is_replicated=False)


def _find_in_stages_1_and_2(parameter: Any, optimizer: Any) -> _Home | None:
    """Parameters of a group are laid end to end and cut into equal parts, wherever the cuts fall."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    groups = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if groups is None:  # the bf16 optimizer of stage 1
        groups = optimizer.fp32_groups_flat_partition
    return _Home(
        groups[mapping.param_group_index],
        mapping.hp_fragment_address.start,
        mapping.lp_fragment_address.start,
        mapping.hp_fragment_address.numel,
        is_replicated=False,
    )


def _list_unsplit_masters(optimizer: Any) -> Iterator[tuple[int, tuple[Tensor, int]]]:
    """id of each low-precision parameter of stage 0, its fp32 master and where in it the parameter begins."""
    if hasattr(optimizer, "fp32_groups"):  # a master for each parameter
        for halves, wholes in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for half, whole in zip(halves, wholes, strict=True):
                yield id(half), (whole, 0)
    elif hasattr(optimizer, "fp32_groups_flat") and hasattr(optimizer, "fp16_groups_flat"):  # one for a group
        for halves, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for half in halves:
                yield id(half), (flat, offset)
                offset += half.numel()


@torch.no_grad()
def spread_weights(engine: Any) -> None:
    """Renew what the model runs on from the fp32 holders, which were written to."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _spread_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        homes = dict(_list_unsplit_masters(optimizer))
        for parameter in engine.module.parameters():
            if id(parameter) in homes:
                holder, offset = homes[id(parameter)]
                parameter.copy_(holder.view(-1)[offset : offset + parameter.numel()].view_as(parameter))


def _spread_stage_3(optimizer: Any) -> None:
    groups = zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    )
    for master, flat, shards in groups:
        flat.copy_(master)
        for shard, values in zip(shards, optimizer.unflatten(flat, shards), strict=True):
            shard.data = values.data
    if optimizer.persistent_parameters:  # those that every rank keeps whole
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
