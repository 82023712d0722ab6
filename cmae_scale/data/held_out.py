"""A few images of a data set as they are looked at between training: centred, without anything random."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae_scale.core.errors import DataError
from cmae_scale.core.settings import ViewsConfig
from cmae_scale.data.decode import decode_centre
from cmae_scale.data.index import ShardIndex
from cmae_scale.data.tar import RawSample, read_samples


def read_held_out(
    index: ShardIndex, *, count: int, views: ViewsConfig, max_mpx: float
) -> tuple[UInt8[Tensor, "count 3 side side"], tuple[str, ...]]:
    """`count` images spread evenly over the data set, with their keys "shard/key".

    Fewer when the data set has fewer. One that cannot be decoded is replaced by the next that can.
    """
    count = min(count, index.total)
    images, keys = [], []
    for number in range(count):
        span = range(number * index.total // count, (number + 1) * index.total // count)
        image, key = _first_readable(index, span, side=views.master_px, max_mpx=max_mpx)
        images.append(image)
        keys.append(key)
    return torch.from_numpy(np.stack(images)), tuple(keys)


def _first_readable(
    index: ShardIndex, span: range, *, side: int, max_mpx: float
) -> tuple[UInt8[np.ndarray, "3 side side"], str]:
    for number in span:
        key, sample = _read_one(index, number)
        try:
            return decode_centre(sample.image, side=side, max_mpx=max_mpx), key
        except DataError:
            continue
    raise DataError(f"none of samples {span.start} to {span.stop - 1} of {index.folder} can be decoded")


def _read_one(index: ShardIndex, number: int) -> tuple[str, RawSample]:
    for shard, info in enumerate(index.shards):
        if number < info.samples:
            sample = next(read_samples(index.path(shard), first=number, count=1, expected=info))
            return f"{info.name}/{sample.key}", sample
        number -= info.samples
    raise AssertionError("number is outside of the index")
