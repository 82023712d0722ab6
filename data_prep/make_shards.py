"""Tar shards and their index from images: original bytes, shuffled once. Run again, it goes on where it stopped."""

import argparse
import hashlib
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (
    None,
    "",
):  # run by path: data_prep/ comes first on sys.path, our packages live one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import ShardIndex, write_index
from data_prep.ledger import WrittenShard, drop_records, open_ledger
from data_prep.sources import SOURCES, Item, Source
from data_prep.writer import Encoding, ShardTask, ShardWriter, write_shards

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
    out = Path(args.out)
    for split, source in SOURCES[args.source](Path(args.root) if args.root else None).items():
        make_shards(source, out / split, args=args)


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
        "--quality", type=_positive, metavar="Q", help="JPEG quality when re-encoding (default 90)"
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out files that are no images, and say which"
    )
    parser.add_argument(
        "--processes", type=_positive, default=os.cpu_count(), metavar="N", help="does not change the result"
    )
    return parser


def make_shards(source: Source, out: Path, *, args: argparse.Namespace) -> ShardIndex:
    """Write whatever `out` still lacks, then its index."""
    encoding = Encoding(args.resize_short, quality=args.quality or 90)
    items = shuffle(source.items, seed=args.seed)[: args.limit]
    tasks = plan_shards(items, samples_per_shard=args.samples_per_shard)
    writer = ShardWriter(out, source.read, encoding, args.skip_bad)
    with open_ledger(out, describe_options(items, args=args)) as finished:
        missing = [task for task in tasks if task.name not in finished]
        started_s = time.monotonic()
        for written in show_progress(
            write_shards(writer, missing, processes=args.processes), missing, out=out
        ):
            finished[written.info.name] = written
        index = build_index(
            source, out, finished=[finished[task.name] for task in tasks], args=args, items=items
        )
        write_index(index)
        drop_records(out)
        for name in finished.keys() - {shard.name for shard in index.shards}:  # nothing but skipped files
            (out / name).unlink(missing_ok=True)
    seconds = time.monotonic() - started_s
    made = sum(len(task.items) for task in missing)
    speed = f", {made / seconds:,.0f} images/s" if made else " (all there already)"
    size_mb = sum(shard.bytes for shard in index.shards) / 1e6
    print(
        f"{out}: {index.total:,} images in {len(index.shards)} shards, {size_mb:,.1f} MB{speed}", flush=True
    )
    return index


def shuffle(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The items in an order fixed by `seed`: Python promises that random() stays as it is, not shuffle()."""
    rng = random.Random(seed)  # noqa: S311 -- not for secrets
    return sorted(items, key=lambda _: rng.random())


def plan_shards(items: Sequence[Item], *, samples_per_shard: int) -> list[ShardTask]:
    """Equal slices, the last one may be shorter."""
    starts = range(0, len(items), samples_per_shard)
    return [
        ShardTask(f"shard-{number:05d}.tar", start, items[start : start + samples_per_shard])
        for number, start in enumerate(starts)
    ]


def describe_options(items: Sequence[Item], *, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides what finished shards contain. (--skip_bad does not: it lets more of them finish.)"""
    listing = hashlib.sha256()
    for item in items:
        listing.update(f"{item.name}\t{item.label}\n".encode(errors="surrogateescape"))
    return {
        "source": args.source,
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
        "limit": args.limit,
        "resize_short": args.resize_short,
        "quality": args.quality,
        "images": len(items),
        "listing_sha256": listing.hexdigest(),
    }


def build_index(
    source: Source,
    out: Path,
    *,
    finished: Sequence[WrittenShard],
    args: argparse.Namespace,
    items: Sequence[Item],
) -> ShardIndex:
    """The index of the finished shards. Empty ones (every file of them was skipped) are not listed."""
    shards = tuple(written.info for written in finished if written.info.samples)
    if not shards:
        raise DataError(f"none of the {len(items)} files of {source.title} is an image")
    return ShardIndex(
        folder=out,
        shards=shards,
        classes=source.classes,
        total=sum(shard.samples for shard in shards),
        source=source.title,
        options=describe_options(items, args=args),
    )


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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(run_command(main))
