"""What make_shards tells its user: progress, a plan, closing figures."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from cmae_scale.core.terminal import format_seconds, make_safe, tell
from cmae_scale.data.decode import GreyRange
from cmae_scale.data.index import INDEX_NAME, ShardIndex, read_value_range
from data_prep.arguments import Command
from data_prep.layout import ShardPlan, ShardSlot
from data_prep.manifest import WrittenShard
from data_prep.sources import Source
from data_prep.stats import ShardStats

LINE_EVERY_S = 5.0
MAX_CLASSES_NAMED = 5
MAX_BAD_LINES = 20  # skipped.jsonl has them all


class Progress:
    """Images done of `total`: a bar on a terminal, to be closed, and a line now and then elsewhere."""

    def __init__(self, total: int, *, doing: str) -> None:
        self.bar = tqdm(total=total, unit=" images", desc=doing, disable=None, leave=False)
        self._total, self._doing, self._done = total, doing, 0
        self._started_s = self._line_s = time.monotonic()

    def add(self, images: int) -> None:
        """Count more of them as done."""
        self._done += images
        self.bar.update(images)
        now_s = time.monotonic()
        if self.bar.disable and now_s - self._line_s > LINE_EVERY_S:
            self._line_s = now_s
            left = format_seconds((now_s - self._started_s) / self._done * (self._total - self._done))
            tell(f"{self._doing}: {self._done:,} of {self._total:,} images, {left} left")


def show_progress(shards: Iterable[WrittenShard], *, total: int, out: Path) -> Iterator[WrittenShard]:
    """Pass the shards on; say how far they are, and which images are bad."""
    progress = Progress(total, doing=str(out))
    with progress.bar:
        bad = 0
        for written in shards:
            for each in written.skipped:
                bad += each.kind == "bad"
                if each.kind == "bad" and bad <= MAX_BAD_LINES:
                    progress.bar.write(make_safe(f"skipped {each.name}: {each.reason}"), file=sys.stderr)
            progress.add(written.info.samples + len(written.skipped))
            yield written


def say_source(source: Source, *, out: Path) -> None:
    """What the source has decided for its user, and classes that will be empty."""
    for note in source.notes:
        tell(f"{out}: {note}")
    empty = [name for label, name in enumerate(source.classes) if not source.items.labels[label]]
    if empty and len(empty) == len(source.classes):
        tell(f"warning: {out}: no image has a label", to=sys.stderr)
    elif len(source.classes) == 1:
        text = f"all images are of one class, {source.classes[0]}"
        tell(f"warning: {out}: {text}: if its folder holds the classes, name it as --root", to=sys.stderr)
    elif empty:
        names = ", ".join(empty[:MAX_CLASSES_NAMED]) + (", ..." if len(empty) > MAX_CLASSES_NAMED else "")
        count = f"{len(empty):,} of {len(source.classes):,} classes"
        tell(f"warning: {out}: {count} have no image: {names}", to=sys.stderr)


def say_plan(source: Source, plan: ShardPlan, *, out: Path, missing: Sequence[ShardSlot]) -> None:
    """What a run would do."""
    count = f"{plan.num_samples:,} images, {len(source.classes)} classes, {len(plan)} shards"
    todo = f"{sum(slot.samples for slot in missing):,} images in {len(missing)} shards"
    tell(f"{out}: {count}; this run would write {todo}")
    for line in source.unlisted.describe():
        tell(f"  {line}")


def summarise(
    index: ShardIndex, source: Source, *, made: ShardStats, whole: ShardStats, seconds: float
) -> None:
    """The closing lines: what is there now, how fast its new part was made, what is in it and what is not."""
    size_mb = sum(shard.bytes for shard in index.shards) / 1e6
    count = (
        f"{index.total:,} images, {len(index.classes)} classes, {len(index.shards)} shards, {size_mb:,.1f} MB"
    )
    tell(f"{index.folder}: {count}, {_say_speed(made, seconds)}")
    if (grey := read_value_range(index.options, name=INDEX_NAME)) is not None:
        tell(f"  deep grey: {grey[0]:g} is read as black, {grey[1]:g} as white (see --value_range)")
    for line in chain(whole.describe(), source.unlisted.describe()):
        tell(f"  {line}")


def say_appended(index: ShardIndex, *, new: int, there: int) -> None:
    """What --append has done."""
    total = f"{index.total:,} images in {len(index.shards)} shards"
    tell(f"{index.folder}: {new:,} images are new, {there:,} were there already; now {total}")


def say_shared_range(shared: GreyRange | None) -> None:
    """That the splits of one command are read alike, where they would not have been."""
    if shared is not None:
        tell(f"deep grey of all splits: {shared[0]:g} is read as black, {shared[1]:g} as white")


def say_cut(index: ShardIndex, *, old: GreyRange, new: GreyRange) -> None:
    """That deep grey of appended images is not all within the range that their set had."""
    tell(f"{index.folder}: new grey of {new[0]:g} to {new[1]:g} is cut to {old[0]:g} to {old[1]:g}")


def summarise_part(
    plan: ShardPlan, made: ShardStats, *, command: Command, out: Path, there: int, seconds: float
) -> None:
    """The closing line of a part that is not the last one."""
    part = f"part {command.part.number}/{command.part.of} done, {_say_speed(made, seconds)}"
    tell(f"{out}: {part}; {there} of {len(plan)} shards are there, the last part writes the index")


def _say_speed(made: ShardStats, seconds: float) -> str:
    if not made.images + made.skipped.total():
        return "all there already"
    return f"{made.images / seconds:,.0f} images/s, {made.image_bytes / 1e6 / seconds:,.1f} MB/s"
