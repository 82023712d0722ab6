"""From finished shards to one data set: duplicates across shards, the list of skipped images, the index."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import GreyRange
from cmae_scale.data.index import (
    INDEX_NAME,
    RANGE_OPTION,
    ShardIndex,
    ShardInfo,
    parse_index,
    read_value_range,
    write_index,
)
from data_prep.layout import ShardPlan, ShardSlot, Skipped
from data_prep.manifest import drop_records, read_lines, read_record, read_skipped, write_skipped
from data_prep.sources import Source
from data_prep.stats import ShardStats, join_ranges
from data_prep.unlisted import KIND

LeftOut = Mapping[int, Skipped]


def write_data_set(
    source: Source, plan: ShardPlan, *, out: Path, finished: Mapping[str, ShardInfo]
) -> tuple[ShardIndex, ShardStats]:
    """Write skipped.jsonl and the index of a folder in which every shard of the plan is finished.

    Also the stats of the shards that were made since there was an index.
    """
    slots = [plan.slot(number) for number in range(len(plan))]
    planned = {slot.name for slot in slots}
    others = [info for name, info in finished.items() if name not in planned]  # added by --append or by hand
    shards = tuple(info for info in [*(finished[slot.name] for slot in slots), *others] if info.samples)
    if not shards:
        raise DataError(f"none of the {len(source.items)} files of {source.title} can be used as an image")
    stats = ShardStats()
    unlisted = (
        {"shard": None, "position": None, "name": name, "kind": KIND, "reason": reason}
        for name, reason in source.unlisted
    )
    added = [line for line in read_lines(out) if line["shard"] in {info.name for info in others}]
    write_skipped(out, chain(_collect(slots, out=out, stats=stats), added, unlisted))
    total = sum(shard.samples for shard in shards)
    options = plan.describe()
    if (grey_range := join_ranges(stats.grey_range, _read_known_range(out))) and RANGE_OPTION not in options:
        options[RANGE_OPTION] = list(grey_range)
    classes = parse_index(out).classes if others else source.classes
    index = ShardIndex(out, shards, classes, total, source.title, options)
    write_index(index)
    drop_records(index)
    return index, stats


def share_range(folders: Iterable[Path]) -> GreyRange | None:
    """Have the deep grey of finished splits read alike, by the extremes of all; None if nothing changed."""
    indexes = [parse_index(folder) for folder in folders if (folder / INDEX_NAME).exists()]
    ranges = [read_value_range(index.options, name=str(index.folder / INDEX_NAME)) for index in indexes]
    shared = functools.reduce(join_ranges, ranges, None)
    changed = [index for index, own in zip(indexes, ranges, strict=True) if own not in (None, shared)]
    for index in changed:
        write_index(replace(index, options={**index.options, RANGE_OPTION: list(shared or ())}))
    return shared if changed else None


def _read_known_range(out: Path) -> GreyRange | None:
    """What the index before says."""
    if not (out / INDEX_NAME).exists():
        return None
    return read_value_range(parse_index(out).options, name=str(out / INDEX_NAME))


def _collect(slots: Iterable[ShardSlot], *, out: Path, stats: ShardStats) -> Iterator[dict[str, Any]]:
    """What was skipped, in the order of the plan; counts what the records say on the way."""
    before = read_skipped(out)
    for slot in slots:
        record = read_record(out, slot.name)
        if record is not None:
            stats.add(record.stats)
        for each in before.get(slot.name, ()) if record is None else record.skipped:
            yield {"shard": slot.name, **each._asdict()}


def plan_left_out(plan: ShardPlan, out: Path) -> dict[str, LeftOut]:
    """The images, by shard, that are in a shard though an equal one stands before them in the shuffled order.

    Reads the records; takes 24 bytes of memory per image.
    """
    positions, digests = _read_digests(plan, out)
    left_out: dict[str, dict[int, Skipped]] = defaultdict(dict)
    for position, first in find_duplicates(positions, digests):
        item, kept = plan.item_at(position), plan.item_at(first)
        labels = "" if item.label == kept.label else f", which has label {kept.label}, not {item.label}"
        reason = f"same content as {kept.name}{labels}"
        left_out[plan.slot_of(position).name][position] = Skipped(position, item.name, "duplicate", reason)
    for name, shard in left_out.items():  # what earlier rounds left out stays out
        record = read_record(out, name)
        earlier = () if record is None else record.skipped
        shard.update({each.position: each for each in earlier if each.kind == "duplicate"})
    return dict(left_out)


def find_duplicates(
    positions: Int64[np.ndarray, " images"], digests: Int64[np.ndarray, "images 2"]
) -> Iterator[tuple[int, int]]:
    """Each position whose digest a smaller position has too, with the smallest one."""
    order = np.lexsort((positions, digests[:, 1], digests[:, 0]))
    ranked = digests[order]
    is_same = np.zeros(len(order), dtype=bool)
    is_same[1:] = (ranked[1:] == ranked[:-1]).all(axis=1)
    first_of_run = np.maximum.accumulate(np.where(is_same, 0, np.arange(len(order))))
    for rank in np.flatnonzero(is_same):
        yield int(positions[order[rank]]), int(positions[order[first_of_run[rank]]])


def _read_digests(
    plan: ShardPlan, out: Path
) -> tuple[Int64[np.ndarray, " images"], Int64[np.ndarray, "images 2"]]:
    positions = np.empty(plan.num_samples, dtype=np.int64)
    digests = np.empty((plan.num_samples, 2), dtype=np.int64)
    count = 0
    for number in range(len(plan)):
        record = read_record(out, plan.slot(number).name)
        for position, digest in () if record is None else record.digests:
            positions[count] = position
            digests[count] = np.frombuffer(bytes.fromhex(digest), dtype="<i8")
            count += 1
    return positions[:count], digests[:count]


def known_left_out(plan: ShardPlan, out: Path) -> dict[str, LeftOut]:
    """The duplicates that a finished folder left out: a shard of it that was lost is made without them."""
    if not plan.options.dedup:
        return {}
    return {
        name: {each.position: each for each in skipped if each.kind == "duplicate"}
        for name, skipped in read_skipped(out).items()
    }
