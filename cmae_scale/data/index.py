"""What a folder of shards holds, as its index.json says: the contract of making shards and reading them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cmae_scale.core.errors import DataError
from cmae_scale.core.files import write_text
from cmae_scale.core.strict_json import parse_json

INDEX_FORMAT = 1
INDEX_NAME = "index.json"
CLASSES_NAME = "classes.json"  # the names again, beside the index, for when that is lost
RANGE_OPTION = "value_range"  # among the options: the values of deep grey that become black and white
KEYS_OPTION = "keys"  # among the options of tars made elsewhere

REMEDY = "delete it and run the same make_shards command again (it makes what is missing), or copy it again"

PositiveInt = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the folder. `name` has no folder part in the file, so an index cannot point elsewhere."""

    name: Annotated[str, Field(pattern=r"^[^/\\]+\.tar$")]
    samples: PositiveInt
    bytes: PositiveInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a data set in their fixed order. `source` and `options` say how they were made."""

    folder: Path
    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]
    total: int
    source: str
    options: dict[str, Any]

    def path(self, shard: int) -> Path:
        """Where shard number `shard` lies."""
        return self.folder / self.shards[shard].name


class IndexFile(BaseModel):
    """The content of an index.json, key by key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    total: PositiveInt
    source: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    shards: Annotated[tuple[ShardInfo, ...], Field(min_length=1)]


def read_index(folder: str | Path) -> ShardIndex:
    """The index of `folder`, checked against the files that lie there (their sizes, not their content).

    Raises DataError when the index or a shard is missing, or when they contradict each other.
    """
    index = parse_index(Path(folder))
    for number, shard in enumerate(index.shards):
        path = index.path(number)
        check_size(str(path), measure_shard(path), expected=shard)
    return index


def parse_index(folder: Path) -> ShardIndex:
    """The index of `folder` by itself, without a look at the shards."""
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except OSError:
        raise missing_index(str(folder)) from None
    parsed = parse_text(text, name=str(path))
    return ShardIndex(folder, parsed.shards, parsed.classes, parsed.total, parsed.source, parsed.options)


def missing_index(folder: str) -> DataError:
    """What to say of a folder without an index."""
    return DataError(
        f"{folder} holds no {INDEX_NAME}: make its shards with `python data_prep/make_shards.py "
        f"--source imagefolder --root IMAGES --out {folder}` (the same command goes on where one stopped), "
        f"or list shards made elsewhere with `python data_prep/check_shards.py --write_index {folder}`"
    )


def parse_text(text: bytes, *, name: str) -> IndexFile:
    """The content of an index.json. DataError, which says `name`, when it is malformed or not consistent."""
    parsed = _validate(text, name)
    names = [shard.name for shard in parsed.shards]
    if len(set(names)) < len(names):
        raise DataError(f"{name} lists a shard twice: make the shards again")
    if (listed := sum(shard.samples for shard in parsed.shards)) != parsed.total:
        raise DataError(
            f"{name} says total {parsed.total} but its shards hold {listed}: make the shards again"
        )
    return parsed


def reads_by_stem(options: Mapping[str, Any]) -> bool:
    """Whether a sample's key is what is before the last dot of a name, not the first (see tar)."""
    return options.get(KEYS_OPTION) == "stem"


def read_value_range(options: Mapping[str, Any], *, name: str) -> tuple[float, float] | None:
    """The values of grey of over 8 bits that become black and white; None if the index `name` says none."""
    match options.get(RANGE_OPTION):
        case None:
            return None
        case [int() | float() as low, int() | float() as high] if math.isfinite(high - low):
            return float(low), float(high)
    raise DataError(f"{name}: options.{RANGE_OPTION} is not two numbers: mend it, or make the shards again")


def read_classes(folder: Path) -> tuple[str, ...] | None:
    """The class names that write_index kept beside the index; None if there are none."""
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    try:
        return TypeAdapter(tuple[str, ...]).validate_json(path.read_bytes(), strict=True)
    except ValueError as error:
        raise DataError(f"{path} is no list of class names ({error}): mend or delete it") from None


def write_index(index: ShardIndex) -> None:
    """Write index.json into `index.folder`: at every moment the old or the new one is there, never half.

    The names of classes are kept once more, in a file of their own: the tars do not hold them.
    """
    content = IndexFile(
        format=INDEX_FORMAT,
        total=index.total,
        source=index.source,
        options=index.options,
        classes=index.classes,
        shards=index.shards,
    )
    fields = {name: value for name, value in content if name != "shards"}
    names = json.dumps(index.classes, indent=2, ensure_ascii=False) + "\n"
    if index.classes:
        write_text(index.folder / CLASSES_NAME, names)
    # one line per shard: readable, and a diff shows which shard changed
    lines = ",\n".join("    " + json.dumps(asdict(shard)) for shard in index.shards)
    head = json.dumps(fields, indent=2, ensure_ascii=False).removesuffix("\n}")
    write_text(index.folder / INDEX_NAME, f'{head},\n  "shards": [\n{lines}\n  ]\n}}\n')


def _validate(text: bytes, path: str) -> IndexFile:
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): make the shards again") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != INDEX_FORMAT:
        raise DataError(
            f"{path} has format {version!r}, this version reads {INDEX_FORMAT}: make the shards again with it"
        )
    try:
        return IndexFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {key}: {first['msg']}: make the shards again") from None


def check_size(location: str, size: int | None, *, expected: ShardInfo) -> None:
    """DataError if a shard's file has another size than its index says. None: not known before reading."""
    if size is not None and size != expected.bytes:
        raise DataError(f"{location} has {size} bytes, {INDEX_NAME} says {expected.bytes}: {REMEDY}")


def measure_shard(path: str | Path) -> int:
    """Size of a shard on this machine, bytes. DataError if it is missing."""
    try:
        return Path(path).stat().st_size
    except OSError:
        raise DataError(
            f"{path} is missing: run the same make_shards command again, or copy it again"
        ) from None
