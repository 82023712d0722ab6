"""Tell whether shards are exactly what their index says: reads every byte, names each damage in one line."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (
    None,
    "",
):  # run by path: data_prep/ comes first on sys.path, our packages live one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tqdm import tqdm

from cmae_scale.core.cli import Parser, run_command
from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import make_safe, tell
from cmae_scale.data.image_formats import describe_content, image_extension
from cmae_scale.data.index import INDEX_NAME, ShardIndex, ShardInfo, parse_index, reads_by_stem
from cmae_scale.data.tar import read_samples
from data_prep.index_tars import find_strays, hash_file, index_folder
from data_prep.manifest import OPTIONS_NAME, STAGING_NAME

EXAMPLES = """examples:
  python data_prep/check_shards.py shards/digits/train
  python data_prep/check_shards.py shards/*/train shards/*/val
  python data_prep/check_shards.py --write_index /data/tars_made_elsewhere
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Check every folder; DataError if anything is wrong."""
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder that holds an index.json")
    parser.add_argument(
        "--write_index",
        action="store_true",
        help="first list the tars that no index lists, and note where samples begin in all shards",
    )
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    if args.write_index:
        for folder in folders:
            index_folder(folder)
    damages = sum(check_folder(folder) for folder in folders)
    strays = sum(_tell_strays(folder) for folder in folders)
    if strays and not damages:
        raise DataError(f"{strays} tars are not in an index: --write_index takes them up")
    if damages:
        raise DataError(
            f"{damages} damaged: delete what is named and run the make_shards command again, or copy it again"
        )


def check_folder(folder: Path) -> int:
    """Number of damaged shards; what is wrong with them goes to stdout."""
    try:
        index = parse_index(folder)
    except DataError as error:
        tell(error)
        return 1
    damages = 0
    with tqdm(index.shards, unit=" shards", desc=str(folder), disable=None, leave=False) as bar:
        for shard in bar:
            found = list(find_damages(index, shard))
            damages += bool(found)
            for damage in found:
                bar.write(make_safe(damage))
    state = f"{damages} of them damaged" if damages else "all well"
    tell(f"{folder}: {index.total:,} images in {len(index.shards)} shards, {state}")
    return damages


def _tell_strays(folder: Path) -> int:
    """Number of tars that no run will read; a line for each."""
    if not (folder / INDEX_NAME).is_file() or (folder / OPTIONS_NAME).exists():
        return 0
    try:
        strays = find_strays(parse_index(folder))
    except DataError:  # told already
        return 0
    if (folder / STAGING_NAME).exists():
        tell(f"{folder}: adding images to it was not finished: run the command with --append again")
    for path in strays:
        tell(f"{path}: {INDEX_NAME} does not list it, so it is not read")
    return len(strays)


def find_damages(index: ShardIndex, shard: ShardInfo) -> Iterator[str]:
    """A line for each thing that is wrong with one shard."""
    path = index.folder / shard.name
    if path.is_file() and hash_file(path) != shard.sha256:
        yield f"{path}: its content is not what was written (SHA-256 differs)"
    keys: set[str] = set()
    by_stem = reads_by_stem(index.options)
    try:
        for sample in read_samples(path, first=0, count=shard.samples, expected=shard, by_stem=by_stem):
            if sample.key in keys:
                yield f"{path}: two samples have the key '{sample.key}'"
            keys.add(sample.key)
            if image_extension(sample.image) is None:
                yield f"{path}: sample '{sample.key}' is {describe_content(sample.image)}"
            if sample.label is not None and sample.label >= len(index.classes):
                yield f"{path}: sample '{sample.key}' has label {sample.label}, which no class has"
    except DataError as error:
        yield str(error)


def run() -> int:
    """Exit status of the command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(run())
