"""What goes into which shard: pure functions of the listing and the options, so that every part agrees."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from cmae_scale.data.index import RANGE_OPTION
from data_prep.listing import Item, Listing
from data_prep.shuffle import Shuffle


@dataclass(frozen=True)
class Options:
    """Everything that decides what a finished shard contains, besides the images themselves.

    `resize_short` re-encodes images whose short side is longer (px) as JPEG of `quality`; None copies all.
    `value_range` are the values of deep grey that become black and white, None for those that are found.
    `val_fraction` is that of the images that a set of their own holds, None if there is none.
    """

    source: str
    seed: int
    samples_per_shard: int
    limit: int | None
    resize_short: int | None
    quality: int
    min_side_px: int | None = None
    dedup: bool = False
    verify_pixels: bool = False
    val_fraction: float | None = None
    value_range: tuple[float, float] | None = None


class Part(NamedTuple):
    """One of `of` runs that share the shards of a folder between them. Counted from 1."""

    number: int
    of: int

    def owns(self, shard: int) -> bool:
        """Whether shard number `shard` is for this part to write."""
        return shard % self.of == self.number - 1


class Skipped(NamedTuple):
    """An image that is in no shard. `kind` is bad, small or duplicate; `reason` says more."""

    position: int
    name: str
    kind: str
    reason: str


class ShardSlot(NamedTuple):
    """Positions first .. first+samples-1 of the shuffled items; keys count from `first`."""

    number: int
    name: str
    first: int
    samples: int


class ShardTask(NamedTuple):
    """A slot with its items. Positions of `left_out` are not even read."""

    name: str
    first: int
    items: Sequence[Item]
    left_out: Mapping[int, Skipped]


@dataclass(frozen=True)
class ShardPlan:
    """The shuffled items in equal slices; the last one may be shorter. Holds the items' list, no item."""

    items: Listing = field(repr=False)
    options: Options

    def __len__(self) -> int:
        return -(-self.num_samples // self.options.samples_per_shard)

    @property
    def num_samples(self) -> int:
        """Items that have a place in a shard."""
        return min(len(self.items), self.options.limit or len(self.items))

    @property
    def shuffle(self) -> Shuffle:
        """Which item stands at which position."""
        return Shuffle(len(self.items), self.options.seed)

    def slot(self, number: int) -> ShardSlot:
        """Shard number `number`."""
        size = self.options.samples_per_shard
        first = number * size
        return ShardSlot(number, f"shard-{number:05d}.tar", first, min(size, self.num_samples - first))

    def slot_of(self, position: int) -> ShardSlot:
        """The shard that holds a position."""
        return self.slot(position // self.options.samples_per_shard)

    def slots(self, part: Part) -> list[ShardSlot]:
        """The shards of a part: every so-manieth, so that all parts end with about as many."""
        return [self.slot(number) for number in range(len(self)) if part.owns(number)]

    def fill(self, slot: ShardSlot, *, left_out: Mapping[int, Skipped]) -> ShardTask:
        """The slot with its items, for a writer."""
        return ShardTask(slot.name, slot.first, list(self.items_of([slot])), left_out)

    def items_of(self, slots: Iterable[ShardSlot]) -> Iterator[Item]:
        """All items of some slots."""
        for slot in slots:
            for number in self.shuffle.find_items(slot.first, slot.samples).tolist():
                yield self.items[number]

    def item_at(self, position: int) -> Item:
        """The item at one position."""
        return self.items[int(self.shuffle.find_items(position, 1)[0])]

    def describe(self) -> dict[str, Any]:
        """The options and a digest of the list, as the index keeps them and a second run compares."""
        options = asdict(self.options)
        if self.options.val_fraction is None:  # it was not always there
            del options["val_fraction"]
        del options[RANGE_OPTION]
        if self.options.value_range is not None:
            options[RANGE_OPTION] = list(self.options.value_range)
        return {**options, "files": len(self.items), "listing_sha256": self.items.digest}
