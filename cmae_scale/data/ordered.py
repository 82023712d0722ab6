"""Samples in the order of the index: all of them once over all ranks, or a few held-out ones to look at."""

import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.blocks import Block, RawBatch, RawRow, StoredSample
from cmae_scale.data.decode import decode_centre
from cmae_scale.data.decoding import BadSamples, Decoding, Pixels, SampleSlot, allocate_for
from cmae_scale.data.plan import Piece
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.stream import NO_LABEL, BatchStream, DecodedRow
from cmae_scale.data.tar import RawSample


def open_ordered(
    shards: ShardSet,
    *,
    decoding: Decoding,
    data: DataConfig,
    batch: int,
    bad: BadSamples,
    rank: int = 0,
    ranks: int = 1,
    fraction: float = 1.0,
    pin: bool = False,
) -> BatchStream:
    """This rank's share of the samples, in batches of `batch` and a shorter last one.

    Ranks get neighbouring runs of the index, so that their results one after the other are in its order. With
    a `fraction`, only the first part of every shard. An image that cannot be decoded is noted in `bad` and
    comes without a label.
    """
    stop = threading.Event()
    pieces = share_pieces(count_samples(shards, fraction), rank=rank, ranks=ranks)

    def decode(row: RawRow, out: Pixels) -> DecodedRow:
        return _decode_exactly(row.block.samples[row.slot], decoding=decoding, bad=bad, out=out)

    return BatchStream(
        _read_batches(shards, pieces, batch=batch, stop=stop),
        decode,
        allocate=allocate_for(decoding, pin=pin),
        workers=data.workers,
        ahead=data.prefetch,
        stop=stop,
    )


def count_samples(shards: ShardSet, fraction: float = 1.0) -> list[int]:
    """How many samples of each shard are used: at least one."""
    return [max(1, ceil(fraction * shard.info.samples)) for shard in shards.shards]


def share_pieces(samples: Sequence[int], *, rank: int, ranks: int) -> list[Piece]:
    """The neighbouring samples that a rank evaluates; shares differ by one sample at most."""
    total = sum(samples)
    first, end = rank * total // ranks, (rank + 1) * total // ranks
    pieces, start = [], 0
    for shard, count in enumerate(samples):
        low, high = max(first, start), min(end, start + count)
        if low < high:
            pieces.append(Piece(shard, low - start, high - low))
        start += count
    return pieces


def _read_batches(
    shards: ShardSet, pieces: Sequence[Piece], *, batch: int, stop: threading.Event
) -> Iterator[RawBatch]:
    """The samples of `pieces` in blocks of a batch."""
    held: list[StoredSample] = []
    for number, sample in enumerate(_read_samples(shards, pieces)):
        if stop.is_set():
            return
        held.append(sample)
        if len(held) == batch:
            yield _as_batch(held, number // batch)
            held = []
    if held:
        yield _as_batch(held, -1)


def _read_samples(shards: ShardSet, pieces: Sequence[Piece]) -> Iterator[StoredSample]:
    starts = list(accumulate((shard.info.samples for shard in shards.shards), initial=0))
    for piece in pieces:
        shard = shards.shards[piece.shard]
        first = starts[piece.shard] + piece.first
        for number, raw in enumerate(shard.read(piece.first, piece.samples), start=first):
            yield StoredSample(number, f"{shard.name}/{raw.key}", raw.image, raw.label, shard.grey_range)


def _as_batch(samples: list[StoredSample], step: int) -> RawBatch:
    block = Block(0, step, order=np.arange(len(samples)), source=iter(samples))
    block.fill()
    return RawBatch(step, 0, [RawRow(block, slot) for slot in range(len(samples))])


def _decode_exactly(sample: StoredSample, *, decoding: Decoding, bad: BadSamples, out: Pixels) -> DecodedRow:
    try:
        slot = SampleSlot(0, 0, sample.number)
        decoding.decode(sample.image, slot, out=out, grey_range=sample.grey_range)
    except DataError as error:
        bad.add(sample.key, str(error))
        out.fill(0)
        return DecodedRow(NO_LABEL, sample.key)
    return DecodedRow(NO_LABEL if sample.label is None else sample.label, sample.key)


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
