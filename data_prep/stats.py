"""What was written, in figures."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cmae_scale.data.decode import GreyRange

DEEP, UPPER, BANDS, PICTURES = "deep", "upper", "bands", "pictures"
NOTES = {
    DEEP: "of grey deeper than 8 bits",
    UPPER: "of more than 8 bits in colour or with transparency (the upper 8 are used)",
    BANDS: "with more bands than are used (the first three, or one of grey)",
    PICTURES: "with several pictures (the first is used)",
}
KINDS = {"bad": "unreadable", "small": "too small", "duplicate": "duplicates"}


@dataclass
class ShardStats:
    """Sums over shards. `short_sides` counts images by their short side, px, `noted` by kinds of NOTES.

    `grey_range` are the extreme values of all grey of over 8 bits, None without any.
    """

    images: int = 0
    image_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    short_sides: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    grey_range: GreyRange | None = None

    def count_image(self, ending: str, *, size: int, short_side: int, noted: tuple[str, ...] = ()) -> None:
        """Add an image of `size` bytes."""
        if noted:
            self.noted.update(noted)
        self.images += 1
        self.image_bytes += size
        self.formats[ending] += 1
        self.short_sides[short_side] += 1

    def add(self, other: "ShardStats") -> None:
        """Add the sums of another stats."""
        self.images += other.images
        self.image_bytes += other.image_bytes
        self.formats += other.formats
        self.short_sides += other.short_sides
        self.skipped += other.skipped
        self.noted += other.noted
        self.grey_range = join_ranges(self.grey_range, other.grey_range)

    def describe(self) -> Iterator[str]:
        """Lines for a user: formats and sizes, and how many were skipped why."""
        if self.images:
            formats = ", ".join(f"{ending} {count:,}" for ending, count in self.formats.most_common())
            low, middle, high = read_quantiles(self.short_sides)
            size_kb = self.image_bytes / self.images / 1e3
            yield f"{formats}; short side {low} to {high} px, median {middle}; {size_kb:,.1f} kB an image"
        if self.noted:
            yield ", ".join(f"{count:,} {NOTES[kind]}" for kind, count in self.noted.most_common())
        if total := self.skipped.total():
            kinds = ", ".join(f"{count:,} {KINDS[kind]}" for kind, count in self.skipped.most_common())
            yield f"skipped {total:,}: {kinds}; skipped.jsonl names each"


def pack_stats(stats: ShardStats) -> dict[str, Any]:
    """A stats as JSON can keep it."""
    return {
        "images": stats.images,
        "image_bytes": stats.image_bytes,
        "formats": stats.formats,
        "short_sides": sorted(stats.short_sides.items()),  # JSON has no numbers as keys
        "skipped": stats.skipped,
        "noted": stats.noted,
        "grey_range": stats.grey_range,
    }


def unpack_stats(packed: Mapping[str, Any]) -> ShardStats:
    """What `pack_stats` packed."""
    return ShardStats(
        packed["images"],
        packed["image_bytes"],
        Counter(packed["formats"]),
        Counter(dict(packed["short_sides"])),
        Counter(packed["skipped"]),
        Counter(packed["noted"]),
        None if packed["grey_range"] is None else (packed["grey_range"][0], packed["grey_range"][1]),
    )


def join_ranges(one: GreyRange | None, other: GreyRange | None) -> GreyRange | None:
    """The range that holds both."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def read_quantiles(counts: Mapping[int, int]) -> tuple[int, int, int]:
    """Least, median (the lower one of two) and greatest of values given with their counts."""
    values = sorted(counts)
    half, passed = (sum(counts.values()) + 1) // 2, 0
    for value in values:
        passed += counts[value]
        if passed >= half:
            return values[0], value, values[-1]
    raise ValueError("no value")
