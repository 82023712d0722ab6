"""Where the samples of a shard begin, kept beside it, so that a stream can begin inside of a shard at once.

`shard-00000.offsets` belongs to `shard-00000.tar`. It is a help and never needed: without it the headers of
all samples before the wanted one are read, a moment on a disk and half a shard of traffic on a network.
"""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cmae_scale.core.errors import DataError
from cmae_scale.core.files import write_text
from cmae_scale.data.index import ShardInfo
from cmae_scale.data.storage import Storage, read_text
from cmae_scale.data.tar_headers import BLOCK

ENDING = ".offsets"
KEPT = 64  # shards whose offsets stay in memory: a megabyte for each 30,000 samples


class _OffsetsFile(BaseModel):
    """The file, key by key. `blocks` has one number more than there are samples: where the last one ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str
    blocks: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=2)]


def offsets_name(shard: str) -> str:
    """The file for a shard's offsets."""
    return shard.removesuffix(".tar") + ENDING


def write_offsets(shard: Path, offsets: list[int], *, sha256: str) -> None:
    """Keep the offsets of a shard beside it: bytes, multiples of 512."""
    blocks = [offset // BLOCK for offset in offsets]
    text = json.dumps({"sha256": sha256, "blocks": blocks}, separators=(",", ":"))
    write_text(shard.with_name(offsets_name(shard.name)), text + "\n")


def read_offsets(storage: Storage, location: str, *, expected: ShardInfo) -> tuple[int, ...] | None:
    """The offsets of a shard from the file `location`; None if it is missing or of another content."""
    try:
        return _read_whole(storage, location, expected)
    except (DataError, ValidationError):
        return None


@lru_cache(maxsize=KEPT)  # a stream that reads a small shard piece by piece spent a third of its time here
def _read_whole(storage: Storage, location: str, expected: ShardInfo) -> tuple[int, ...]:
    text = read_text(storage, location)
    content = _OffsetsFile.model_validate_json(text or b"")
    blocks = content.blocks
    fits = (
        content.sha256 == expected.sha256
        and len(blocks) == expected.samples + 1
        and all(one < other for one, other in pairwise(blocks))
        and blocks[-1] * BLOCK < expected.bytes
    )
    if not fits:
        raise DataError(f"{location} belongs to another shard")
    return tuple(block * BLOCK for block in blocks)
