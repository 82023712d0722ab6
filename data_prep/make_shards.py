"""Tar shards with an index, from images: the original bytes, shuffled once. Run again, it continues."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

if __package__ in (
    None,
    "",
):  # run by path: data_prep/ comes first on sys.path, our packages live one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import ShardIndex, write_index
from data_prep.layout import Options, ShardTask, describe, plan_shards
from data_prep.ledger import WrittenShard, drop_records, open_ledger
from data_prep.sources import SOURCES, Source
from data_prep.writer import ShardWriter, write_shards

DEFAULT_QUALITY = 90
LINE_EVERY_S = 5.0
EXAMPLES = """examples:
  python data_prep/make_shards.py --source digits --out shards/digits
  python data_prep/make_shards.py --source imagefolder --root imagenet/train --out shards/imagenet_train
  python data_prep/make_shards.py --source flat --root photos --out shards/photos --resize_short 384
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the shards of every split of the source."""
    args = build_parser().parse_args(argv)
    if args.quality is not None and args.resize_short is None:
        raise ConfigError("--quality needs --resize_short: images are never re-encoded otherwise")
    options = Options(
        source=args.source,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        limit=args.limit,
        resize_short=args.resize_short,
        quality=args.quality or DEFAULT_QUALITY,
    )
    try:
        for split, source in SOURCES[args.source](Path(args.root) if args.root else None).items():
            out = Path(args.out) / split
            make_shards(source, out, options=options, skip_bad=args.skip_bad, processes=args.processes)
    except OSError as error:  # a full disk, a folder that may not be read, ...
        raise DataError(f"{error.filename or args.out}: {error.strerror}") from None


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, choices=SOURCES, help="what the images are")
    parser.add_argument("--root", metavar="DIR", help="folder with the images (imagefolder, flat)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--samples_per_shard", type=_positive, default=2000, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the shuffle (default %(default)s)"
    )
    parser.add_argument(
        "--limit", type=_positive, metavar="N", help="keep the first N of the shuffled images"
    )
    parser.add_argument(
        "--resize_short",
        type=_positive,
        metavar="PX",
        help="re-encode images whose short side is longer than PX",
    )
    parser.add_argument(
        "--quality",
        type=_positive,
        metavar="Q",
        help=f"JPEG quality when re-encoding (default {DEFAULT_QUALITY})",
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out files that are no images, and say which"
    )
    parser.add_argument(
        "--processes", type=_positive, default=os.cpu_count(), metavar="N", help="does not change the result"
    )
    return parser


def make_shards(source: Source, out: Path, *, options: Options, skip_bad: bool, processes: int) -> ShardIndex:
    """Write whatever `out` still lacks, then its index."""
    tasks = plan_shards(source.items, options)
    writer = ShardWriter(out, source.read, options, skip_bad)
    description = describe(source.items, options)
    started_s = time.monotonic()
    with open_ledger(out, description) as finished:
        missing = [task for task in tasks if task.name not in finished]
        for written in show_progress(write_shards(writer, missing, processes=processes), missing, out=out):
            finished[written.info.name] = written
        shards = tuple(finished[task.name].info for task in tasks if finished[task.name].info.samples)
        if not shards:
            raise DataError(f"none of the {len(source.items)} files of {source.title} is an image")
        total = sum(shard.samples for shard in shards)
        index = ShardIndex(out, shards, source.classes, total, source.title, description)
        write_index(index)
        drop_records(index)
    summarise(index, made=sum(len(task.items) for task in missing), seconds=time.monotonic() - started_s)
    return index


def show_progress(
    shards: Iterable[WrittenShard], tasks: Sequence[ShardTask], *, out: Path
) -> Iterator[WrittenShard]:
    """Pass the shards on, with a bar on a terminal and a line now and then elsewhere."""
    total = sum(len(task.items) for task in tasks)
    line_s = time.monotonic()
    with tqdm(total=total, unit=" images", desc=str(out), disable=None, leave=False) as bar:
        done = 0
        for written in shards:
            for reason in written.skipped:
                bar.write(f"skipped {reason}", file=sys.stderr)
            done += written.info.samples + len(written.skipped)
            bar.update(written.info.samples + len(written.skipped))
            if bar.disable and time.monotonic() - line_s > LINE_EVERY_S:
                line_s = time.monotonic()
                print(f"{out}: {done:,} of {total:,} images", flush=True)
            yield written


def summarise(index: ShardIndex, *, made: int, seconds: float) -> None:
    """The closing line: what is there now, and how fast its new part was made."""
    size_mb = sum(shard.bytes for shard in index.shards) / 1e6
    speed = f"{made / seconds:,.0f} images/s" if made else "all there already"
    count = f"{index.total:,} images, {len(index.classes)} classes, {len(index.shards)} shards"
    print(f"{index.folder}: {count}, {size_mb:,.1f} MB, {speed}", flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(run_command(main))
