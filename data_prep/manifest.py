"""What is already done in a folder of shards, so that a command that was killed goes on where it stopped.

While shards are being made, a folder holds `.making.json` (the options) and one `.<shard>.done.json` beside
each finished shard; when index.json is in place it says all of that, and they go. Several parts may be at
work in one folder: each writes shards of its own, and whoever finishes the last one writes the index.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.files import PART, remove, write_first, write_whole
from cmae_scale.core.strict_json import parse_json
from cmae_scale.data.index import INDEX_NAME, ShardIndex, ShardInfo, parse_index
from cmae_scale.data.offsets import offsets_name
from data_prep.layout import Part, ShardPlan, Skipped
from data_prep.listing import Item
from data_prep.locks import hold_part
from data_prep.sources import Read, Source
from data_prep.stats import ShardStats, pack_stats, unpack_stats

OPTIONS_NAME = ".making.json"
STAGING_NAME = ".appending"  # folder in which --append makes its shards
RECORD_ENDING = ".done.json"
SKIPPED_NAME = "skipped.jsonl"
SCRATCH = ".scratch-"
SHARD_PART = re.compile(rf"\.shard-(\d+)\..*{re.escape(PART)}")


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard, what was left out of it, and with --dedup the digest of each image in it."""

    info: ShardInfo
    skipped: tuple[Skipped, ...] = ()
    stats: ShardStats = field(default_factory=ShardStats)
    digests: tuple[tuple[int, str], ...] = ()  # position, 128 bits of BLAKE2b of the original bytes


@contextmanager
def open_manifest(out: Path, options: dict[str, Any], *, part: Part) -> Iterator[None]:
    """The folder, held for this part of the work alone, cleaned of what its killed forerunners left.

    ConfigError when another process holds it, or when it was begun with other options.
    """
    out.mkdir(parents=True, exist_ok=True)
    with hold_part(out, part):
        has_tars = any(out.glob("*.tar"))  # asked first: options are written before any tar
        begun = _read_options(out)
        if begun is None:
            if has_tars:
                raise ConfigError(
                    f"{out} holds tar files of unknown origin: write another --out, or delete them"
                )
            if not write_first(out / OPTIONS_NAME, json.dumps(options, indent=2).encode()):
                begun = _read_options(out)  # another part was faster
        if begun is not None and (changed := [name for name in options if begun.get(name) != options[name]]):
            raise ConfigError(_describe_change(out, begun, options, changed))
        for left in out.glob(f"*{PART}"):
            shard = SHARD_PART.fullmatch(left.name)
            if part.of == 1 or (shard is not None and part.owns(int(shard[1]))):
                remove(left)
        for left in out.glob(f"{_scratch_prefix(part)}*"):
            remove(left)
        yield


@contextmanager
def open_scratch(out: Path, *, part: Part) -> Iterator[Path]:
    """A folder for what a part needs on disk while it works: beside its shards, where there must be room."""
    with tempfile.TemporaryDirectory(prefix=_scratch_prefix(part), dir=out) as folder:
        yield Path(folder)


@contextmanager
def open_reader(source: Source, items: Iterable[Item], *, out: Path, part: Part) -> Iterator[Read]:
    """What gives the bytes of any of `items`, copied to a scratch folder of `out` if need be."""
    if source.stage is None:
        yield source.read
        return
    with open_scratch(out, part=part) as scratch:
        yield source.stage(scratch, iter(items))


def record_shard(out: Path, written: WrittenShard) -> None:
    """Note that a shard is finished. To be called when its tar is in place."""
    with write_whole(_record_path(out, written.info.name)) as file:
        record = {
            "info": asdict(written.info),
            "skipped": written.skipped,
            "stats": pack_stats(written.stats),
            "digests": written.digests,
        }
        file.write(json.dumps(record).encode())


def read_record(out: Path, name: str) -> WrittenShard | None:
    """The note on one shard; None if there is none (any more)."""
    path = _record_path(out, name)
    if not path.exists():
        return None
    with _told_where(path, remedy="delete it, and its shard is made again"):
        record = parse_json(path.read_bytes())
        return WrittenShard(
            ShardInfo(**record["info"]),
            tuple(Skipped(*each) for each in record["skipped"]),
            unpack_stats(record["stats"]),
            tuple((position, digest) for position, digest in record["digests"]),
        )


def read_finished(out: Path, plan: ShardPlan) -> dict[str, ShardInfo]:
    """All shards that need no more work: those in place with the right size, and those that stay empty."""
    finished: dict[str, ShardInfo] = {}
    if (out / INDEX_NAME).exists():
        finished = {info.name: info for info in parse_index(out).shards}
        for name, skipped in read_skipped(out).items():
            if name not in finished and len(skipped) == plan.slot_of(skipped[0].position).samples:
                finished[name] = ShardInfo(name, 0, 0, "")
    for path in out.glob(f".*{RECORD_ENDING}"):
        name = path.name.removeprefix(".").removesuffix(RECORD_ENDING)
        if (record := read_record(out, name)) is not None:
            finished[name] = record.info
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    return {name: info for name, info in finished.items() if not info.bytes or sizes.get(name) == info.bytes}


def read_lines(out: Path) -> Iterator[dict[str, Any]]:
    """What a finished folder says that it lacks, line by line."""
    path = out / SKIPPED_NAME
    if path.exists():
        with _told_where(path, remedy="copy it again"), path.open("rb") as file:
            for line in file:
                yield dict(parse_json(line))


def read_skipped(out: Path) -> dict[str, list[Skipped]]:
    """What a finished folder says that its shards lack, by shard. Files that were never listed have none."""
    skipped: dict[str, list[Skipped]] = defaultdict(list)
    with _told_where(out / SKIPPED_NAME, remedy="copy it again"):
        for fields in read_lines(out):
            if (shard := fields.pop("shard")) is not None:
                skipped[shard].append(_check_skipped(Skipped(**fields)))
    return skipped


def _check_skipped(skipped: Skipped) -> Skipped:
    if type(skipped.position) is not int or not all(isinstance(text, str) for text in skipped[1:]):
        raise TypeError("position must be a number, the rest text")
    return skipped


def write_skipped(out: Path, skipped: Iterator[dict[str, Any]]) -> None:
    """Write what is in no shard, one a line; no file if there is nothing."""
    first = next(skipped, None)
    if first is None:
        (out / SKIPPED_NAME).unlink(missing_ok=True)
        return
    with write_whole(out / SKIPPED_NAME) as file:
        for each in chain([first], skipped):
            file.write(json.dumps(each).encode() + b"\n")


def drop_records(index: ShardIndex) -> None:
    """Remove what index.json has made superfluous, and shards of which every image was skipped."""
    listed = {shard.name for shard in index.shards}
    for record in index.folder.glob(f".*{RECORD_ENDING}"):
        name = record.name.removeprefix(".").removesuffix(RECORD_ENDING)
        if name not in listed:
            (index.folder / name).unlink(missing_ok=True)
            (index.folder / offsets_name(name)).unlink(missing_ok=True)
        record.unlink(missing_ok=True)
    for left in index.folder.glob(f"*{PART}"):
        remove(left)
    (index.folder / OPTIONS_NAME).unlink(missing_ok=True)


def _scratch_prefix(part: Part) -> str:
    return f"{SCRATCH}{part.number}-of-{part.of}-"


def _record_path(out: Path, name: str) -> Path:
    return out / f".{name}{RECORD_ENDING}"


def _read_options(out: Path) -> dict[str, Any] | None:
    """The options that the folder was begun with; None for a fresh one."""
    path = out / OPTIONS_NAME
    if not path.exists():
        return parse_index(out).options if (out / INDEX_NAME).exists() else None
    with _told_where(path, remedy=f"make the shards in another --out, or delete {out}"):
        return dict(parse_json(path.read_bytes()))


@contextmanager
def _told_where(path: Path, *, remedy: str) -> Iterator[None]:
    """Whatever is wrong with the content of `path` becomes one sentence."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): {remedy}") from None


def _describe_change(out: Path, begun: dict[str, Any], options: dict[str, Any], changed: list[str]) -> str:
    if changed in (["listing_sha256"], ["files", "listing_sha256"]):
        return (
            f"the images are not those that {out} was begun with, or not their labels: add what is new "
            f"with --append, write another --out, or delete {out}"
        )
    differences = ", ".join(f"{name} {begun.get(name)} (now {options[name]})" for name in changed)
    return f"{out} was begun with {differences}: give the same options, another --out, or delete {out}"
