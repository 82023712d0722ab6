"""Which image goes where: pure functions of the listing and the options, so that a second run agrees."""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.sources import Item


class ShardTask(NamedTuple):
    """A slice of the shuffled items. `first` is the position of its first item; keys count from there."""

    name: str
    first: int
    items: Sequence[Item]


def shuffle(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The items in an order fixed by `seed`: Python promises that random() stays as it is, not shuffle()."""
    rng = random.Random(seed)  # noqa: S311 -- not for secrets
    return sorted(items, key=lambda _: rng.random())


def plan_shards(items: Sequence[Item], *, samples_per_shard: int) -> list[ShardTask]:
    """Equal slices; the last one may be shorter."""
    starts = range(0, len(items), samples_per_shard)
    return [
        ShardTask(f"shard-{number:05d}.tar", start, items[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def hash_listing(items: Sequence[Item]) -> str:
    """SHA-256 of all names and labels: tells whether a folder still lists the same images."""
    listing = hashlib.sha256()
    for item in items:
        listing.update(f"{item.name}\t{item.label}\n".encode(errors="surrogateescape"))
    return listing.hexdigest()
