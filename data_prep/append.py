"""More images for finished shards, which stay as they are, byte for byte.

What is new is made as a folder of its own inside of the old one, with all that make_shards can (it goes on
where it was killed); its shards then get the next numbers of the old folder, and the index lists both.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.files import remove
from cmae_scale.data.index import (
    INDEX_NAME,
    RANGE_OPTION,
    ShardIndex,
    parse_index,
    read_value_range,
    reads_by_stem,
    write_index,
)
from cmae_scale.data.offsets import offsets_name
from cmae_scale.data.tar import read_samples
from data_prep.arguments import Command
from data_prep.encoding import encode
from data_prep.index_tars import hash_file
from data_prep.layout import Options
from data_prep.listing import Item, Listing
from data_prep.locks import hold_merge
from data_prep.manifest import STAGING_NAME, open_reader, read_lines, write_skipped
from data_prep.relabel import add_classes
from data_prep.reporting import say_appended, say_cut
from data_prep.sources import Read, Source

SHARD_NAME = re.compile(r"shard-(\d{5,9})\.tar")
DIGEST_BYTES = 16
PRESENT = "there already, by its content"


def append_shards(
    source: Source, out: Path, *, command: Command, make: Callable[[Source, Path], None]
) -> None:
    """Add the images of `source` that the shards in `out` do not hold yet. `make` writes shards.

    Images are the same if the same bytes would be stored. Classes that are new get the next numbers.
    """
    if not (out / INDEX_NAME).exists():
        raise ConfigError(f"{out} holds no {INDEX_NAME} to add to: leave out --append")
    staging = out / STAGING_NAME
    with hold_merge(out):
        index = parse_index(out)
        _check_options(index, command.options)
        is_begun = staging.exists()
        staging.mkdir(exist_ok=True)
        source = add_classes(source, index.classes)
        with open_reader(source, source.items, out=staging, part=command.part) as read:
            known = _list_digests(index)
            new = Listing(_pass_new(source, read, known=known, options=command.options))
        if new:
            make(replace(source, items=new), staging)
        if new and not command.dry_run:
            index = _take_up(index, parse_index(staging))
        if not (command.dry_run and is_begun):
            remove(staging)
    say_appended(index, new=len(new), there=len(source.items) - len(new))


def _check_options(index: ShardIndex, options: Options) -> None:
    for name in ("resize_short", "quality") if options.resize_short else ("resize_short",):
        before, now = index.options.get(name), getattr(options, name)
        if name in index.options and before != now:
            raise ConfigError(f"{index.folder} was made with --{name} {before}, not {now}: give the same")


def _list_digests(index: ShardIndex) -> set[bytes]:
    """Of every image in the shards. Takes about 100 bytes of memory each."""
    digests: set[bytes] = set()
    by_stem = reads_by_stem(index.options)
    for number, shard in enumerate(tqdm(index.shards, unit=" shards", disable=None, leave=False)):
        samples = read_samples(
            index.path(number), first=0, count=shard.samples, expected=shard, by_stem=by_stem
        )
        digests.update(_digest(sample.image) for sample in samples)
    return digests


def _pass_new(source: Source, read: Read, *, known: set[bytes], options: Options) -> Iterator[Item]:
    """The items whose images are not known yet, each content once. Bad ones too: who writes them says so."""
    for item in tqdm(source.items, unit=" images", disable=None, leave=False):
        try:
            digest = _digest(encode(read(item), options).data)
        except (DataError, OSError):
            yield item
            continue
        if digest in known:
            source.unlisted.add(item.name, PRESENT)
        else:
            known.add(digest)
            yield item


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _take_up(index: ShardIndex, made: ShardIndex) -> ShardIndex:
    """Move the shards of `made` into the folder of `index` and list them there."""
    first = _next_number(index)
    names = {shard.name: f"shard-{number:05d}.tar" for number, shard in enumerate(made.shards, start=first)}
    for shard in made.shards:
        target = index.folder / names[shard.name]
        if target.exists() and hash_file(target) != shard.sha256:
            raise DataError(f"{target} is in the way, and in no index: move it elsewhere")
        (made.folder / shard.name).replace(target)  # first: without it both are made again
        offsets = made.folder / offsets_name(shard.name)
        offsets.replace(index.folder / offsets_name(target.name))
    write_skipped(index.folder, _join_skipped(index.folder, made.folder, names))
    joined = replace(
        index,
        shards=(*index.shards, *(replace(shard, name=names[shard.name]) for shard in made.shards)),
        classes=made.classes,
        total=index.total + made.total,
        source=f"{index.source} + {made.source}",
        options=_join_options(index, made),
    )
    write_index(joined)
    return joined


def _next_number(index: ShardIndex) -> int:
    """A number that no shard has, nor any that the command that made the folder could still make."""
    numbers = [int(match[1]) for shard in index.shards if (match := SHARD_NAME.fullmatch(shard.name))]
    match index.options:
        case {"files": int(files), "limit": int() | None as limit, "samples_per_shard": int(size)} if (
            size > 0
        ):
            numbers.append(-(-min(files, limit or files) // size) - 1)
    return max(numbers, default=-1) + 1


def _join_options(index: ShardIndex, made: ShardIndex) -> dict[str, Any]:
    """Those of the old shards: their range stays, or they would be other images. It is told what it cuts."""
    old, new = (read_value_range(each.options, name=INDEX_NAME) for each in (index, made))
    if new is None:
        return index.options
    if old is None:
        return {**index.options, RANGE_OPTION: list(new)}
    if new[0] < old[0] or new[1] > old[1]:
        say_cut(index, old=old, new=new)
    return index.options


def _join_skipped(out: Path, made: Path, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    yield from (line for line in read_lines(out) if line["shard"] not in names.values())
    for line in read_lines(made):
        yield {**line, "shard": names.get(line["shard"])}
