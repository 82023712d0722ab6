"""Tar shards with an index, from images: the original bytes, shuffled once. Run again, it continues."""

import functools
import sys
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

if __package__ in (
    None,
    "",
):  # run by path: data_prep/ comes first on sys.path, our packages live one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import DataError
from data_prep.append import append_shards
from data_prep.arguments import Command, read_command
from data_prep.executors import run_tasks
from data_prep.held_out import hold_out
from data_prep.layout import Part, ShardPlan, ShardSlot
from data_prep.locks import hold_merge
from data_prep.manifest import open_manifest, open_reader, read_finished
from data_prep.merge import LeftOut, known_left_out, plan_left_out, share_range, write_data_set
from data_prep.relabel import drop_labels, take_classes
from data_prep.reporting import (
    say_plan,
    say_shared_range,
    say_source,
    show_progress,
    summarise,
    summarise_part,
)
from data_prep.sources import SOURCES, Source
from data_prep.stats import ShardStats
from data_prep.writer import ShardWriter


def main(argv: Sequence[str] | None = None) -> None:
    """Make the shards of every split of the source."""
    command = read_command(argv, description=__doc__ or "")
    try:
        splits = list_splits(command)
        for split, source in splits.items():
            if command.append:
                make = functools.partial(make_shards, command=command)
                append_shards(source, command.out / split, command=command, make=make)
            else:
                make_shards(source, command.out / split, command=command)
        if not command.append and not command.dry_run:
            say_shared_range(share_range(command.out / split for split in splits))
    except OSError as error:  # a full disk, a folder that may not be read, ...
        raise DataError(
            f"{error.filename or command.out}: {error.strerror} (mend it, then the same command goes on)"
        ) from None


def list_splits(command: Command) -> dict[str, Source]:
    """What the command is to write: the source of each split, with the labels that were asked for."""
    splits = SOURCES[command.options.source](command.request)
    if command.request.no_labels:
        splits = {split: drop_labels(source) for split, source in splits.items()}
    if command.classes is not None:
        splits = {split: take_classes(source, command.classes) for split, source in splits.items()}
    if command.options.val_fraction is not None:
        splits = hold_out(splits, command.options.val_fraction, command=command)
    return splits


def make_shards(source: Source, out: Path, *, command: Command) -> None:
    """Write whatever `out` still lacks of this part; when no shard is missing any more, its index."""
    plan = ShardPlan(source.items, command.options)
    say_source(source, out=out)
    if command.dry_run:
        finished = read_finished(out, plan) if out.is_dir() else {}
        say_plan(source, plan, out=out, missing=find_missing(plan, finished, part=command.part))
        return
    started_s = time.monotonic()
    with open_manifest(out, plan.describe(), part=command.part):
        with hold_merge(out):  # or another part could finish the folder while we look at it
            missing = find_missing(plan, read_finished(out, plan), part=command.part)
            left_out = known_left_out(plan, out)
        made = write_slots(source, plan, missing, left_out=left_out, out=out, command=command)
        seconds = time.monotonic() - started_s
        with hold_merge(out):
            finished = read_finished(out, plan)
            if lacking := len(find_missing(plan, finished, part=Part(1, 1))):
                there = len(plan) - lacking
                summarise_part(plan, made, command=command, out=out, there=there, seconds=seconds)
                return
            if plan.options.dedup:
                left_out = plan_left_out(plan, out)
                doubtful = [plan.slot_of(min(positions)) for positions in left_out.values()]
                write_slots(source, plan, doubtful, left_out=left_out, out=out, command=command)
                finished = read_finished(out, plan)
            index, whole = write_data_set(source, plan, out=out, finished=finished)
    summarise(index, source, made=made, whole=whole, seconds=seconds)


def find_missing(plan: ShardPlan, finished: Container[str], *, part: Part) -> list[ShardSlot]:
    """The shards that a part has still to write."""
    return [slot for slot in plan.slots(part) if slot.name not in finished]


def write_slots(
    source: Source,
    plan: ShardPlan,
    slots: Sequence[ShardSlot],
    *,
    left_out: Mapping[str, LeftOut],
    out: Path,
    command: Command,
) -> ShardStats:
    """Write shards, wherever the command says; what was written, in figures."""
    made = ShardStats()
    if not slots:
        return made
    with open_reader(source, plan.items_of(slots), out=out, part=command.part) as read:
        writer = ShardWriter(out, read, plan.options, command.skip_bad)
        tasks = (plan.fill(slot, left_out=left_out.get(slot.name, {})) for slot in slots)
        shards = run_tasks(
            writer.write, tasks, executor=command.executor, processes=min(command.processes, len(slots))
        )
        for written in show_progress(shards, total=sum(slot.samples for slot in slots), out=out):
            made.add(written.stats)
    return made


def run() -> int:
    """Exit status of the command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
