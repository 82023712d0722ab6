"""What goes into which shard: pure functions of the listing and the options, so that a second run agrees."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from data_prep.sources import Item


@dataclass(frozen=True)
class Options:
    """Everything that decides what a finished shard contains, besides the images themselves.

    `resize_short` re-encodes images whose short side is longer (px) as JPEG of `quality`; None copies all.
    """

    source: str
    seed: int
    samples_per_shard: int
    limit: int | None
    resize_short: int | None
    quality: int


class ShardTask(NamedTuple):
    """A slice of the shuffled items. `first` is the position of its first item; keys count from there."""

    name: str
    first: int
    items: Sequence[Item]


def plan_shards(items: Sequence[Item], options: Options) -> list[ShardTask]:
    """Equal slices of the shuffled items; the last one may be shorter."""
    chosen = shuffle(items, seed=options.seed)[: options.limit]
    starts = range(0, len(chosen), options.samples_per_shard)
    return [
        ShardTask(f"shard-{number:05d}.tar", start, chosen[start : start + options.samples_per_shard])
        for number, start in enumerate(starts)
    ]


def shuffle(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The items in an order fixed by `seed`: Python promises that random() stays as it is, not shuffle()."""
    rng = random.Random(seed)  # noqa: S311 -- not for secrets
    return sorted(items, key=lambda _: rng.random())


def describe(items: Sequence[Item], options: Options) -> dict[str, Any]:
    """The options and a digest of all names and labels, as the index keeps them and a second run compares."""
    listing = hashlib.sha256()
    for item in items:
        listing.update(f"{item.name}\t{item.label}\n".encode(errors="surrogateescape"))
    return {**asdict(options), "files": len(items), "listing_sha256": listing.hexdigest()}
