"""A few images of a data set as they are looked at between training: centred, without anything random."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae_scale.config.cmae import ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import decode_centre
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.tar import RawSample


def read_held_out(
    shards: ShardSet, *, count: int, views: ViewsConfig, max_mpx: float
) -> tuple[UInt8[Tensor, "count 3 side side"], tuple[str, ...]]:
    """`count` images spread evenly over the data set, with their keys "shard/key".

    Fewer when the data set has fewer. One that cannot be decoded is replaced by the next that can.
    """
    count = min(count, shards.total)
    images, keys = [], []
    for number in range(count):
        span = range(number * shards.total // count, (number + 1) * shards.total // count)
        image, key = _first_readable(shards, span, side=views.master_px, max_mpx=max_mpx)
        images.append(image)
        keys.append(key)
    return torch.from_numpy(np.stack(images)), tuple(keys)


def _first_readable(
    shards: ShardSet, span: range, *, side: int, max_mpx: float
) -> tuple[UInt8[np.ndarray, "3 side side"], str]:
    for number in span:
        key, sample = _read_one(shards, number)
        try:
            return decode_centre(sample.image, side=side, max_mpx=max_mpx), key
        except DataError:
            continue
    raise DataError(f"none of samples {span.start} to {span.stop - 1} of {shards.describe()} can be decoded")


def _read_one(shards: ShardSet, number: int) -> tuple[str, RawSample]:
    for shard in shards.shards:
        if number < shard.info.samples:
            sample = next(shard.read(number, 1))
            return f"{shard.name}/{sample.key}", sample
        number -= shard.info.samples
    raise AssertionError("number is outside of the data set")
