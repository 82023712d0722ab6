"""Which samples form which step, as arithmetic on integers: no files, no ranks, no state but the step.

An epoch shuffles the shards, lays their samples in one row and cuts it into `streams` equal runs, each
shuffled in blocks of `window` samples. Every step takes the same number of samples of each run, so the shards
are read front to back by `streams` cursors at once. A rank serves the rows of the global batch that are its
own: how many ranks, threads or restarts there are cannot change what a row holds.
"""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from cmae_scale.core.errors import ConfigError

WORD = 1 << 64
BLOCK_WORDS = 4


class Purpose(IntEnum):
    """What numbers are for, so that equal slots of different uses do not share them."""

    SHARD_ORDER = 1
    EPOCH_START = 2
    BLOCK_ORDER = 3
    CROP = 4
    AUGMENT = 5
    FEATURE_ORDER = 6


class _Own(threading.local):
    """A generator of each thread: setting its state takes a quarter of the time that making one does."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(0)
        self.key = np.zeros(2, dtype=np.uint64)
        self.counter = np.zeros(4, dtype=np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"key": self.key, "counter": self.counter},
            "buffer": np.zeros(BLOCK_WORDS, dtype=np.uint64),
            "buffer_pos": BLOCK_WORDS,  # nothing is left in it
            "has_uint32": 0,
            "uinteger": 0,
        }


_OWN = _Own()


def draw_words(
    seed: int, purpose: Purpose, *, slot: tuple[int, int, int], count: int
) -> UInt64[np.ndarray, " count"]:
    """`count` uniform 64-bit words of one slot. `seed` counts modulo 2^64."""
    key, counter = _OWN.key, _OWN.counter
    key[0], key[1] = seed % WORD, int(purpose)
    counter[1], counter[2], counter[3] = slot
    _OWN.generator.state = _OWN.state
    return np.asarray(_OWN.generator.random_raw(count))


def draw_uniforms(
    seed: int, purpose: Purpose, *, slot: tuple[int, int, int], count: int
) -> Float64[np.ndarray, " count"]:
    """`count` numbers in [0, 1), multiples of 2^-53."""
    return (draw_words(seed, purpose, slot=slot, count=count) >> np.uint64(11)) * 2.0**-53


def draw_permutation(
    seed: int, purpose: Purpose, *, slot: tuple[int, int, int], count: int
) -> Int64[np.ndarray, " count"]:
    """0 .. count-1 in random order."""
    return np.argsort(draw_words(seed, purpose, slot=slot, count=count), kind="stable")


MAX_STREAMS = 64  # of `plan_streams` left to itself: each costs a file handle and up to two windows of memory


class Piece(NamedTuple):
    """Neighbouring samples of one shard, from number `first` on."""

    shard: int
    first: int
    samples: int


class Slot(NamedTuple):
    """Where a row is found: position `slot` of the shuffled block number `block` of one run."""

    epoch: int
    stream: int
    block: int
    slot: int


@dataclass(frozen=True)
class DataPlan:
    """The five things that the order of samples depends on."""

    shard_samples: tuple[int, ...]
    global_batch: int
    streams: int
    window: int
    seed: int

    def __post_init__(self) -> None:
        if self.total < self.global_batch:
            raise ConfigError(
                f"the shards hold {self.total} samples, fewer than train_batch_size ({self.global_batch}): "
                "lower train_batch_size or make more shards"
            )
        if self.global_batch % self.streams:
            raise ConfigError(
                f"cmae.data.streams {self.streams} does not divide train_batch_size {self.global_batch}: "
                f"write {plan_streams(self.global_batch, None)}, or leave it out"
            )

    @cached_property
    def total(self) -> int:
        """Samples in all shards."""
        return sum(self.shard_samples)

    @cached_property
    def stream_rows(self) -> int:
        """Rows of every global batch that one stream fills."""
        return self.global_batch // self.streams

    @cached_property
    def steps_per_epoch(self) -> int:
        """Whole steps that an epoch gives. At least one."""
        return self.total // self.streams // self.stream_rows

    @cached_property
    def run_samples(self) -> int:
        """Samples that an epoch uses of one run."""
        return self.steps_per_epoch * self.stream_rows

    @property
    def samples_per_epoch(self) -> int:
        """Samples that an epoch uses."""
        return self.steps_per_epoch * self.global_batch

    @property
    def tail(self) -> int:
        """Samples that an epoch leaves out: others in every epoch, because it starts elsewhere."""
        return self.total - self.samples_per_epoch

    def find_row(self, *, step: int, row: int) -> Slot:
        """Which shuffled block, and where in it, holds `row` of the batch of `step` (counted from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        stream, row_in_stream = divmod(row, self.stream_rows)
        block, slot = divmod(step_in_epoch * self.stream_rows + row_in_stream, self.window)
        return Slot(epoch, stream, block, slot)

    @property
    def fingerprint(self) -> str:
        """Equal for two plans only if they give every step the same samples: for resuming to compare."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def plan_streams(global_batch: int, requested: int | None) -> int:
    """`requested`, or else the largest divisor of the batch up to MAX_STREAMS."""
    if requested is not None:
        return requested
    return max(count for count in range(1, MAX_STREAMS + 1) if global_batch % count == 0)


def block_samples(plan: DataPlan, block: int) -> int:
    """Size of a block: the window, or what is left of the run for its last one."""
    return min(plan.window, plan.run_samples - block * plan.window)


def block_order(plan: DataPlan, *, epoch: int, stream: int, block: int) -> Int64[np.ndarray, " samples"]:
    """For every position of the shuffled block, which of its samples (in reading order) stands there."""
    return draw_permutation(
        plan.seed, Purpose.BLOCK_ORDER, slot=(epoch, stream, block), count=block_samples(plan, block)
    )


def run_pieces(plan: DataPlan, *, epoch: int, stream: int, first: int = 0) -> Iterator[Piece]:
    """What to read, in order, for the run of a stream from its sample number `first` to its end."""
    start = stream * (plan.total // plan.streams)
    skip, left = start + first, plan.run_samples - first
    for piece in epoch_pieces(plan, epoch):
        skipped = min(skip, piece.samples)
        count = min(left, piece.samples - skipped)
        if count > 0:
            yield Piece(piece.shard, piece.first + skipped, count)
        skip, left = skip - skipped, left - count


def epoch_pieces(plan: DataPlan, epoch: int) -> list[Piece]:
    """The row that an epoch is cut from: the shards in random order, begun at a random sample of the first.

    What stands before that sample comes last. So the runs begin elsewhere in every epoch, and the few samples
    after their last whole step are not always the same ones, even with a single shard.
    """
    order = draw_permutation(
        plan.seed, Purpose.SHARD_ORDER, slot=(epoch, 0, 0), count=len(plan.shard_samples)
    ).tolist()
    head, *others = order
    size = plan.shard_samples[head]
    word = draw_words(plan.seed, Purpose.EPOCH_START, slot=(epoch, 0, 0), count=1)
    begin = int(word[0]) % size
    return [
        Piece(head, begin, size - begin),
        *(Piece(shard, 0, plan.shard_samples[shard]) for shard in others),
        *([Piece(head, 0, begin)] if begin else []),
    ]
