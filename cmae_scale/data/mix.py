"""The plan of a run: one data set, or several that each fill a fixed share of every batch. Integers alone.

The streams of a batch are dealt to the data sets by weight. Each set goes through its own epochs, in the
order that its own plan says, so a small set comes round more often than a large one. As in a plan of one set,
what a row holds follows from the step alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.plan import DataPlan, Slot, plan_streams
from cmae_scale.data.shard_set import ShardSet

SEED_STEP = 1 << 32  # between the seeds of two sets: equal shards should not be shuffled equally


@dataclass(frozen=True)
class MixPlan:
    """`owners` says for each stream of the global batch which of the `parts` fills it.

    A part's plan has the streams and the rows that it owns.
    """

    parts: tuple[DataPlan, ...]
    owners: tuple[int, ...]
    seed: int

    @property
    def streams(self) -> int:
        """Streams of all parts."""
        return len(self.owners)

    @cached_property
    def global_batch(self) -> int:
        """Rows of a step."""
        return sum(part.global_batch for part in self.parts)

    @cached_property
    def stream_rows(self) -> int:
        """Rows of every global batch that one stream fills."""
        return self.global_batch // self.streams

    @cached_property
    def total(self) -> int:
        """Samples of all parts."""
        return sum(part.total for part in self.parts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see as many samples as all parts hold, whichever of them those are."""
        if len(self.parts) == 1:
            return self.parts[0].steps_per_epoch
        return max(1, self.total // self.global_batch)

    @property
    def fingerprint(self) -> str:
        """Equal for two plans only if they give every step the same samples: for resuming to compare."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, int | str]:
        """What resuming compares: in the order in which a difference says most."""
        return {
            "images": self.total,
            "shards": sum(len(part.shard_samples) for part in self.parts),
            "streams": self.streams,
            "shuffle_window": self.parts[0].window,
            "order": self.fingerprint,
        }

    @property
    def first_shards(self) -> list[int]:
        """The number of each part's first shard among all shards."""
        return [0, *accumulate(len(part.shard_samples) for part in self.parts[:-1])]

    def find_row(self, *, step: int, row: int) -> tuple[int, Slot]:
        """The part that fills `row` of the global batch of `step`, and the slot in that part's own plan."""
        stream, row_in_stream = divmod(row, self.stream_rows)
        owner, own_stream = self._own_streams[stream]
        part = self.parts[owner]
        return owner, part.find_row(step=step, row=own_stream * part.stream_rows + row_in_stream)

    @cached_property
    def _own_streams(self) -> list[tuple[int, int]]:
        """For each stream its owner and its number among the owner's streams: asked for every row."""
        return [(owner, self.owners[:stream].count(owner)) for stream, owner in enumerate(self.owners)]

    def rows_of(self, *, rank: int, ranks: int, micro: int = 0, accumulation: int = 1) -> range:
        """Rows of every global batch that a micro-batch holds: ranks in order, then their micro-batches."""
        pieces = ranks * accumulation
        assert self.global_batch % pieces == 0, "the batch sizes of the run file were not checked"
        size = self.global_batch // pieces
        first = (rank * accumulation + micro) * size
        return range(first, first + size)


def plan_data(
    shards: ShardSet, data: DataConfig, *, global_batch: int, seed: int, samples: Sequence[int] | None = None
) -> MixPlan:
    """The plan for the shards with the run file's settings; `samples` are used of each shard, else all."""
    streams = plan_streams(global_batch, data.streams)
    if global_batch % streams:
        raise ConfigError(
            f"cmae.data.streams {streams} does not divide train_batch_size {global_batch}: "
            f"write {plan_streams(global_batch, None)}, or leave it out"
        )
    sizes = [shard.info.samples for shard in shards.shards] if samples is None else list(samples)
    shard_counts: tuple[int, ...]
    if data.mix is None:
        owners, shard_counts = (0,) * streams, (len(sizes),)
    else:
        owners, shard_counts = deal_streams(data.mix, streams), shards.parts
    ends = list(accumulate(shard_counts))
    parts = [
        DataPlan(
            shard_samples=tuple(sizes[end - count : end]),
            global_batch=owners.count(part) * (global_batch // streams),
            streams=owners.count(part),
            window=data.shuffle_window,
            seed=seed + part * SEED_STEP,
        )
        for part, (count, end) in enumerate(zip(shard_counts, ends, strict=True))
    ]
    return MixPlan(tuple(parts), owners, seed)


def deal_streams(weights: Sequence[float], streams: int) -> tuple[int, ...]:
    """Which weight each stream belongs to: evenly spread, so that every rank gets its share of each.

    The share of a weight is exact to one stream. ConfigError when that is none.
    """
    shares = [weight / sum(weights) for weight in weights]
    owners: list[int] = []
    for dealt in range(1, streams + 1):
        lacking = [share * dealt - owners.count(part) for part, share in enumerate(shares)]
        owners.append(lacking.index(max(lacking)))
    for part, share in enumerate(shares):
        if part not in owners:
            raise ConfigError(
                f"cmae.data.mix: entry {part + 1} has a share of {share:.2%}, less than one of {streams} "
                "streams: raise it, or raise cmae.data.streams"
            )
    return tuple(owners)
