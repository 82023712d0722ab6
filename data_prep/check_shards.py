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

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import tell
from cmae_scale.data.image_formats import describe_content, image_extension
from cmae_scale.data.index import ShardIndex, ShardInfo, parse_index
from cmae_scale.data.tar import read_samples
from data_prep.index_tars import hash_file, index_folder

EXAMPLES = """examples:
  python data_prep/check_shards.py shards/digits/train
  python data_prep/check_shards.py shards/*/train shards/*/val
  python data_prep/check_shards.py --write_index /data/tars_made_elsewhere
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Check every folder; DataError if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder that holds an index.json")
    parser.add_argument(
        "--write_index",
        action="store_true",
        help="first list the tars of a folder without an index, and note where samples begin in all shards",
    )
    args = parser.parse_args(argv)
    folders = [Path(folder) for folder in args.folders]
    if args.write_index:
        for folder in folders:
            index_folder(folder)
    damages = sum(check_folder(folder) for folder in folders)
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
                bar.write(damage)
    state = f"{damages} of them damaged" if damages else "all well"
    tell(f"{folder}: {index.total:,} images in {len(index.shards)} shards, {state}")
    return damages


def find_damages(index: ShardIndex, shard: ShardInfo) -> Iterator[str]:
    """A line for each thing that is wrong with one shard."""
    path = index.folder / shard.name
    if path.is_file() and hash_file(path) != shard.sha256:
        yield f"{path}: its content is not what was written (SHA-256 differs)"
    keys: set[str] = set()
    try:
        for sample in read_samples(path, first=0, count=shard.samples, expected=shard):
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
