"""Samples as compressed bytes in the plan's order: each stream is read a shuffle window at a time."""

import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, count, islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from cmae_scale.data.decode import GreyRange
from cmae_scale.data.mix import MixPlan
from cmae_scale.data.plan import DataPlan, Slot, block_order, run_pieces
from cmae_scale.data.shard_set import Shard, ShardSet


class StoredSample(NamedTuple):
    """An image as it lies in its shard. `number` counts over the whole index, `key` is "shard/key".

    `grey_range` is that of the set for grey of over 8 bits (see decode.scale_grey).
    """

    number: int
    key: str
    image: bytes
    label: int | None
    grey_range: GreyRange | None = None


class Part(NamedTuple):
    """One data set of a mix and its plan. Its samples count from `first_number` among all sets."""

    shards: Sequence[Shard]
    plan: DataPlan
    first_number: int


class Block:
    """The samples of one shuffle window. It is filled by the reading thread, then only read."""

    def __init__(
        self, epoch: int, number: int, *, order: Int64[np.ndarray, " samples"], source: Iterator[StoredSample]
    ) -> None:
        self.epoch = epoch
        self.number = number
        self.samples: list[StoredSample] = []  # in reading order
        self._order = order
        self._source = source

    def fill(self, samples: int | None = None) -> None:
        """Read that many samples more, or all that are missing."""
        missing = len(self._order) - len(self.samples)
        self.samples.extend(islice(self._source, missing if samples is None else min(samples, missing)))

    def candidates(self, slot: int, *, distance: int) -> Iterator[StoredSample]:
        """The sample at `slot` of the shuffled block, then all others to replace it if it is bad.

        Those begin `distance` slots on and wrap around. When that is the number of rows which the stream has
        in a step, they belong to the next step, so that a global batch does not hold an image twice.
        """
        size = len(self._order)
        others = ((slot + distance + i) % size for i in range(size))
        return (self.samples[self._order[i]] for i in chain([slot], others))


class BlockReader:
    """The blocks of one stream one after another, from that of `start` on, with at most two in memory."""

    def __init__(self, part: Part, *, start: Slot) -> None:
        self._blocks = list_blocks(part, start=start)
        self._current: Block | None = None
        self._ahead = next(self._blocks)

    def reach(self, slot: Slot) -> Block:
        """The full block that `slot` lies in: that of last time or a later one.

        Blocks between them are read and dropped: they are all another rank's, where a step takes more of a
        stream than a window holds.
        """
        wanted = (slot.epoch, slot.block)
        while self._current is None or (self._current.epoch, self._current.number) < wanted:
            self._ahead.fill()
            self._current, self._ahead = self._ahead, next(self._blocks)
        assert (self._current.epoch, self._current.number) == wanted
        return self._current

    def read_ahead(self, samples: int) -> None:
        """Read a part of the next block, so that the work of reading is spread evenly over the steps."""
        self._ahead.fill(samples)


def list_blocks(part: Part, *, start: Slot) -> Iterator[Block]:
    """Endless: all blocks of a stream from that of `start` on, still empty. Fill each before the next."""
    first = start.block
    for epoch in count(start.epoch):
        source = read_run(part, epoch=epoch, stream=start.stream, first=first * part.plan.window)
        for number in range(first, -(-part.plan.run_samples // part.plan.window)):
            order = block_order(part.plan, epoch=epoch, stream=start.stream, block=number)
            yield Block(epoch, number, order=order, source=source)
        first = 0


def read_run(part: Part, *, epoch: int, stream: int, first: int) -> Iterator[StoredSample]:
    """The samples of a run in reading order, from its sample number `first` on."""
    starts = list(accumulate(part.plan.shard_samples, initial=part.first_number))
    for piece in run_pieces(part.plan, epoch=epoch, stream=stream, first=first):
        shard = part.shards[piece.shard]
        samples = shard.read(piece.first, piece.samples)
        for number, raw in enumerate(samples, start=starts[piece.shard] + piece.first):
            yield StoredSample(number, f"{shard.name}/{raw.key}", raw.image, raw.label, shard.grey_range)


class RawRow(NamedTuple):
    """One row of a batch before decoding: a position of a shuffled block."""

    block: Block
    slot: int


class RawBatch(NamedTuple):
    """One micro-batch of a rank before decoding."""

    step: int
    micro: int
    rows: list[RawRow]


def read_raw_batches(
    shards: ShardSet,
    plan: MixPlan,
    *,
    rank: int,
    ranks: int,
    accumulation: int,
    steps: range,
    stop: threading.Event,
) -> Iterator[RawBatch]:
    """All micro-batches of a rank in order, from every stream that its rows belong to. Ends early at `stop`.

    Beginning at any step reads at most what lies before it in its windows.
    """
    micros = [
        plan.rows_of(rank=rank, ranks=ranks, micro=m, accumulation=accumulation) for m in range(accumulation)
    ]
    parts = split_parts(shards, plan)
    readers: dict[tuple[int, int], BlockReader] = {}
    for step in steps:
        for micro, own in enumerate(micros):
            rows = []
            for row in own:
                if stop.is_set():
                    return
                part, slot = plan.find_row(step=step, row=row)
                if (reader := readers.get((part, slot.stream))) is None:
                    reader = readers[part, slot.stream] = BlockReader(parts[part], start=slot)
                rows.append(RawRow(reader.reach(slot), slot.slot))
            yield RawBatch(step, micro, rows)
        for reader in readers.values():
            reader.read_ahead(plan.stream_rows)


def split_parts(shards: ShardSet, plan: MixPlan) -> list[Part]:
    """The shards of each part of the plan."""
    numbers = accumulate((part.total for part in plan.parts[:-1]), initial=0)
    return [
        Part(shards.shards[first : first + len(part.shard_samples)], part, number)
        for part, first, number in zip(plan.parts, plan.first_shards, numbers, strict=True)
    ]
