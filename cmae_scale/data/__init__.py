"""From shards on disk to batches of uint8 master images on the device, in an order that is pure arithmetic.

Imports core only, and is the only folder of the package that may import webdataset. The parts that need no
torch can be had without it: sharding a folder of images should not wait for it to load.
"""

from typing import TYPE_CHECKING

from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.index import ShardIndex, ShardInfo, open_shards, read_index, write_index
from cmae_scale.data.plan import DataPlan, plan_data, plan_streams

if TYPE_CHECKING:
    from cmae_scale.data.held_out import read_held_out
    from cmae_scale.data.prefetch import copy_ahead
    from cmae_scale.data.stream import BatchStream, MasterBatch, open_batches

__all__ = [
    "BadSamples",
    "BatchStream",
    "DataPlan",
    "MasterBatch",
    "ShardIndex",
    "ShardInfo",
    "copy_ahead",
    "open_batches",
    "open_shards",
    "plan_data",
    "plan_streams",
    "read_held_out",
    "read_index",
    "write_index",
]


def __getattr__(name: str) -> object:
    """The names above that need torch, loaded when first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cmae_scale.data.held_out import read_held_out
    from cmae_scale.data.prefetch import copy_ahead
    from cmae_scale.data.stream import BatchStream, MasterBatch, open_batches

    with_torch = (read_held_out, copy_ahead, BatchStream, MasterBatch, open_batches)
    return {each.__name__: each for each in with_torch}[name]
