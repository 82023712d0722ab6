"""The command line of make_shards."""

import argparse
import codecs
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cmae_scale.core.cli import Parser
from cmae_scale.core.errors import ConfigError
from data_prep.executors import EXECUTORS
from data_prep.layout import Options, Part
from data_prep.sources import SOURCES, SourceRequest

DEFAULT_QUALITY = 90
EXAMPLES = """examples:
  python data_prep/make_shards.py --source digits --out shards/digits
  python data_prep/make_shards.py --source imagefolder --root images --val_fraction 0.05 --out shards/mine
  python data_prep/make_shards.py --source flat --root photos --out shards/photos --resize_short 384
  python data_prep/make_shards.py --source imagenet --root downloads --out shards/imagenet
  python data_prep/make_shards.py --source webdataset --root other --out shards/other --dedup --skip_bad
  python data_prep/make_shards.py --source huggingface --root datasets/food101 --out shards/food101
  python data_prep/make_shards.py --source cifar10 --root downloads --out shards/cifar10
  python data_prep/make_shards.py --source csv --root list.csv --out shards/listed
  ... --part $SLURM_ARRAY_TASK_ID/16      one of 16 runs that fill the same --out, at the same time or not

what --root is:
  imagefolder  a folder of class folders             imagenet     the folder of the downloaded ILSVRC2012 tars
  flat         a folder of images, no labels         webdataset   a folder of tars, a tar, or a pattern
  csv          a CSV file: columns path, label       huggingface  a save_to_disk folder, or Parquet files
                                                     (folders and files of splits: each its own DIR/SPLIT)
  cifar10, cifar100, stl10, svhn, mnist, fashion_mnist: a folder for torchvision's downloads
"""


@dataclass(frozen=True)
class Command:
    """What the user asked for. Only `options` decides what is in the shards."""

    options: Options
    request: SourceRequest
    out: Path
    part: Part
    executor: str
    processes: int
    skip_bad: bool
    dry_run: bool
    append: bool
    classes: Path | None


def read_command(argv: Sequence[str] | None, *, description: str) -> Command:
    """The command line as a Command; ConfigError for options that contradict each other."""
    args = _build_parser(description).parse_args(argv)
    if args.quality is not None and args.resize_short is None:
        raise ConfigError("--quality needs --resize_short: images are never re-encoded otherwise")
    if args.dry_run and args.val_fraction is not None:
        raise ConfigError("--val_fraction has to read all images, which --dry_run does not: leave out one")
    if args.append and args.part != Part(1, 1):
        raise ConfigError("--append has to see all images: leave out --part")
    if args.no_labels and (args.classes or args.label_column):
        raise ConfigError("--no_labels leaves out what --classes and --label_column ask for")
    options = Options(
        source=args.source,
        seed=args.seed,
        samples_per_shard=args.samples_per_shard,
        limit=args.limit,
        resize_short=args.resize_short,
        quality=args.quality or DEFAULT_QUALITY,
        min_side_px=args.min_side_px,
        dedup=args.dedup,
        verify_pixels=args.verify_pixels,
        val_fraction=args.val_fraction,
        value_range=_read_range(args.value_range),
    )
    return Command(
        options=options,
        request=SourceRequest(
            Path(args.root) if args.root else None,
            image_column=args.image_column,
            label_column=args.label_column,
            no_labels=args.no_labels,
            encoding=args.encoding,
            merge_splits=args.merge_splits,
        ),
        out=Path(args.out),
        part=args.part,
        executor=args.executor,
        processes=args.processes,
        skip_bad=args.skip_bad,
        dry_run=args.dry_run,
        append=args.append,
        classes=Path(args.classes) if args.classes else None,
    )


def _build_parser(description: str) -> argparse.ArgumentParser:
    parser = Parser(
        description=description, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", required=True, choices=SOURCES, metavar="KIND", help=f"one of {', '.join(SOURCES)}")
    add("--root", metavar="PATH", help="where the images are (see below)")
    add("--out", required=True, metavar="DIR", help="folder for the shards")
    _add_how_it_is_read(parser)
    _add_what_is_written(parser)
    _add_how_it_is_written(parser)
    return parser


def _add_how_it_is_read(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how --root is read").add_argument
    add(
        "--image_column",
        metavar="NAME",
        help="csv, huggingface: column of the images (default: the one that fits)",
    )
    add(
        "--label_column",
        metavar="NAME",
        help="csv, huggingface: column of the labels (default: label, class, target, ...)",
    )
    add("--no_labels", action="store_true", help="take no labels: pre-training needs none")
    add(
        "--classes",
        metavar="FROM",
        help="number the classes as in this folder of shards: for a val set that lacks some",
    )
    add(
        "--encoding",
        type=_encoding,
        metavar="NAME",
        help="of class names and tables that are not UTF-8, such as cp1252",
    )
    add(
        "--merge_splits",
        action="store_true",
        help="folders, files and columns that say train, val or test are nothing special: one set of all",
    )


def _add_what_is_written(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is in the shards").add_argument
    add("--samples_per_shard", type=_positive, default=2000, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="of the shuffle (default %(default)s)")
    add(
        "--val_fraction",
        type=_fraction,
        metavar="F",
        help="write DIR/train and DIR/val, with this part of the images, chosen by their content",
    )
    add(
        "--append",
        action="store_true",
        help="add to the shards in DIR, which stay as they are, the images that they do not hold yet",
    )
    add("--limit", type=_positive, metavar="N", help="keep the first N of the shuffled images")
    add("--min_side_px", type=_positive, metavar="PX", help="leave out images whose shorter side is below PX")
    add("--dedup", action="store_true", help="keep one of images with exactly the same bytes")
    add("--skip_bad", action="store_true", help="leave out files that are no images instead of stopping")
    add(
        "--verify_pixels",
        action="store_true",
        help="decode every image: one that is cut or broken is bad (slow)",
    )
    add(
        "--value_range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="values of 16-bit and 32-bit grey that are black and white (default: the extremes of the set)",
    )
    add(
        "--resize_short",
        type=_positive,
        metavar="PX",
        help="re-encode images whose short side is longer than PX",
    )
    add(
        "--quality",
        type=_positive,
        metavar="Q",
        help=f"JPEG quality when re-encoding (default {DEFAULT_QUALITY})",
    )


def _add_how_it_is_written(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how they are written (does not change a byte)").add_argument
    add(
        "--processes",
        type=_positive,
        default=os.cpu_count(),
        metavar="N",
        help="of this machine (default: its cores)",
    )
    add(
        "--part",
        type=_part,
        default=Part(1, 1),
        metavar="I/N",
        help="write every Nth shard, I from 1 to N; the run that completes them writes the index",
    )
    add(
        "--executor",
        choices=EXECUTORS,
        default="processes",
        help='ray: on the cluster of RAY_ADDRESS (needs "cmae-scale[ray]")',
    )
    add("--dry_run", action="store_true", help="list the images, say what would be written, write nothing")


def _read_range(values: Sequence[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--value_range {low:g} {high:g} must be two numbers, the smaller one first")
    return low, high


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def _encoding(text: str) -> str:
    try:
        "".encode(text)  # refuses codecs that are not of text
        return codecs.lookup(text).name
    except LookupError:
        raise argparse.ArgumentTypeError(f"'{text}' is no encoding that Python knows") from None


def _part(text: str) -> Part:
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 1 to N, as in 1/8 ... 8/8")
    return Part(int(numbers[1]), int(numbers[2]))
