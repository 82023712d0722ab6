"""What is already done in a folder of shards, so that a command that was killed goes on where it stopped.

While shards are being made, a folder holds `.making.json` (the options) and one `.<shard>.done.json` beside
each finished shard; when index.json is in place it says all of that, and they go.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, write_text
from cmae_scale.data.index import INDEX_NAME, ShardIndex, ShardInfo, parse_index

OPTIONS_NAME = ".making.json"
RECORD_ENDING = ".done.json"


class WrittenShard(NamedTuple):
    """A finished shard and what was left out of it, a sentence each."""

    info: ShardInfo
    skipped: tuple[str, ...]


@contextmanager
def open_ledger(out: Path, options: dict[str, Any]) -> Iterator[dict[str, WrittenShard]]:
    """The shards of `out` that are finished, by name, with the folder held for this process alone.

    ConfigError when another process holds it, or when it was begun with other options.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _hold(out):
        begun = _read_options(out)
        if begun is None:
            if any(out.glob("*.tar")):
                raise ConfigError(
                    f"{out} holds tar files of unknown origin: write another --out, or delete them"
                )
            write_text(out / OPTIONS_NAME, json.dumps(options, indent=2))
        elif begun != options:
            raise ConfigError(_describe_change(out, begun, options))
        for part in out.glob(f"*{PART}"):
            part.unlink()
        yield _read_records(out)


def record_shard(out: Path, written: WrittenShard) -> None:
    """Note that a shard is finished. To be called when its tar is in place."""
    record = json.dumps({"info": asdict(written.info), "skipped": written.skipped})
    write_text(out / f".{written.info.name}{RECORD_ENDING}", record)


def drop_records(index: ShardIndex) -> None:
    """Remove what index.json has made superfluous, and shards of which every file was skipped."""
    listed = {shard.name for shard in index.shards}
    for record in index.folder.glob(f".*{RECORD_ENDING}"):
        name = record.name.removeprefix(".").removesuffix(RECORD_ENDING)
        if name not in listed:
            (index.folder / name).unlink(missing_ok=True)
        record.unlink()
    (index.folder / OPTIONS_NAME).unlink(missing_ok=True)


@contextmanager
def _hold(out: Path) -> Iterator[None]:
    """The folder's own lock: the kernel lets go of it however the process ends."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(
            f"another make_shards is writing to {out}: wait for it or write another --out"
        ) from None
    finally:
        os.close(folder)


def _read_options(out: Path) -> dict[str, Any] | None:
    """The options that the folder was begun with; None for a fresh one."""
    if (out / OPTIONS_NAME).exists():
        begun: dict[str, Any] = json.loads((out / OPTIONS_NAME).read_bytes())
        return begun
    return parse_index(out).options if (out / INDEX_NAME).exists() else None


def _read_records(out: Path) -> dict[str, WrittenShard]:
    """All records whose tar is still there with the right size."""
    records = [json.loads(path.read_bytes()) for path in out.glob(f".*{RECORD_ENDING}")]
    written = [WrittenShard(ShardInfo(**record["info"]), tuple(record["skipped"])) for record in records]
    if (out / INDEX_NAME).exists():
        written += [WrittenShard(info, ()) for info in parse_index(out).shards]
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar")}
    return {shard.info.name: shard for shard in written if sizes.get(shard.info.name) == shard.info.bytes}


def _describe_change(out: Path, begun: dict[str, Any], options: dict[str, Any]) -> str:
    changed = [name for name in options if begun.get(name) != options[name]]
    if changed in (["listing_sha256"], ["files", "listing_sha256"]):
        return f"the images are not those that {out} was begun with: write another --out, or delete {out}"
    differences = ", ".join(f"{name} {begun.get(name)} (now {options[name]})" for name in changed)
    return f"{out} was begun with {differences}: give the same options, another --out, or delete {out}"
