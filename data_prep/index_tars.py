"""An index for tars that were made elsewhere, and where the samples of any tar begin."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import GreyRange
from cmae_scale.data.index import (
    INDEX_NAME,
    KEYS_OPTION,
    RANGE_OPTION,
    ShardIndex,
    ShardInfo,
    parse_index,
    read_classes,
    reads_by_stem,
    write_index,
)
from cmae_scale.data.offsets import write_offsets
from cmae_scale.data.tar import find_offsets, list_members, read_samples, split_members
from data_prep.encoding import find_grey_range
from data_prep.manifest import OPTIONS_NAME, STAGING_NAME
from data_prep.sources.labels import PLAIN_IDS
from data_prep.stats import join_ranges

READ_BYTES = 1 << 20

T = TypeVar("T")


class Described(NamedTuple):
    """A tar as an index has it, the largest label in it (-1: none) and the extremes of its deep grey."""

    info: ShardInfo
    largest_label: int
    grey_range: GreyRange | None


def index_folder(folder: Path) -> ShardIndex:
    """The index of a folder, with all tars that lie there, and the offsets of its shards, written anew.

    Tars that an index does not list are added behind those that it does. Without an index, they are listed
    in the order of their names; the classes are those that were kept beside the index, or as many as the
    labels need. DataError at any damage.
    """
    if (folder / OPTIONS_NAME).exists() or (folder / STAGING_NAME).exists():
        raise DataError(f"{folder} is not finished: run its make_shards command to the end first")
    has_index = (folder / INDEX_NAME).is_file()
    index = _take_up_strays(parse_index(folder)) if has_index else _make_index(folder)
    by_stem = reads_by_stem(index.options)
    for shard in _show(index.shards, folder):
        path = folder / shard.name
        write_offsets(path, _find(path, by_stem=by_stem), sha256=shard.sha256)
    return index


def find_strays(index: ShardIndex) -> list[Path]:
    """Tars in the folder that its index does not list, by name."""
    listed = {shard.name for shard in index.shards}
    return sorted(path for path in index.folder.glob("*.tar") if path.name not in listed)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _make_index(folder: Path) -> ShardIndex:
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files to list")
    by_stem = _choose_keys(paths)
    classes = read_classes(folder)
    tars = [
        _describe(path, by_stem=by_stem, classes=PLAIN_IDS if classes is None else len(classes))
        for path in _show(paths, folder)
    ]
    if classes is None:
        classes = tuple(str(number) for number in range(max(tar.largest_label for tar in tars) + 1))
    options: dict[str, Any] = {KEYS_OPTION: "stem"} if by_stem else {}
    index = ShardIndex(folder, (), classes, 0, source="tars made elsewhere", options=options)
    return _add(index, tars)


def _take_up_strays(index: ShardIndex) -> ShardIndex:
    paths = find_strays(index)
    by_stem = reads_by_stem(index.options)
    if not paths:
        return index
    for path in paths:
        if _find_samples(path) != _find(path, by_stem=by_stem)[:-1]:
            raise DataError(
                f"{path}: dots in its names mean something else than in the other shards: pack it with "
                "make_shards --source webdataset"
            )
    classes = len(index.classes)
    return _add(
        index, [_describe(path, by_stem=by_stem, classes=classes) for path in _show(paths, index.folder)]
    )


def _add(index: ShardIndex, tars: Sequence[Described]) -> ShardIndex:
    """Write the index with more shards. A range of deep grey that it has stays: old images are read by it."""
    options = index.options
    grey_range = None
    for tar in tars:
        grey_range = join_ranges(grey_range, tar.grey_range)
    if grey_range is not None and RANGE_OPTION not in options:
        options = {**options, RANGE_OPTION: list(grey_range)}
    shards = (*index.shards, *(tar.info for tar in tars))
    index = replace(index, shards=shards, total=sum(shard.samples for shard in shards), options=options)
    write_index(index)
    return index


def _describe(path: Path, *, by_stem: bool, classes: int) -> Described:
    """DataError for a tar without samples, or with a label that is not below `classes`."""
    samples = len(_find(path, by_stem=by_stem)) - 1
    if samples < 1:
        raise DataError(f"{path} holds no samples: remove it")
    info = ShardInfo(path.name, samples, path.stat().st_size, hash_file(path))
    largest, grey_range = -1, None
    for sample in read_samples(path, first=0, count=samples, expected=info, by_stem=by_stem):
        if sample.label is not None and sample.label >= classes:
            raise DataError(
                f"{path}: the label of sample '{sample.key}', {sample.label}, is not below {classes}: pack "
                "the tars with make_shards --source webdataset, which numbers labels anew"
            )
        largest = max(largest, -1 if sample.label is None else sample.label)
        grey_range = join_ranges(grey_range, find_grey_range(sample.image))
    return Described(info, largest, grey_range)


def _show(things: Sequence[T], folder: Path) -> Iterable[T]:
    return tqdm(things, unit=" shards", desc=str(folder), disable=None, leave=False)  # type: ignore[no-any-return]


def _choose_keys(paths: Sequence[Path]) -> bool:
    """Whether the samples in all these tars are named by what is before the last dot, not the first."""
    dotted = [path for path in paths if _find_samples(path) != _find(path, by_stem=False)[:-1]]
    for path in paths if dotted else ():
        if _find_samples(path) != _find(path, by_stem=True)[:-1]:
            raise DataError(
                f"{path}: dots in names mean parts of a sample, and in {dotted[0].name} they do not: pack "
                "the tars with make_shards --source webdataset"
            )
    return bool(dotted)


def _find_samples(path: Path) -> list[int]:
    """Where the samples of a tar begin, by whatever rule each of its names follows."""
    with path.open("rb") as file:
        return [own[0].header for _, own in split_members(list_members(file, name=str(path)))]


def _find(path: Path, *, by_stem: bool) -> list[int]:
    with path.open("rb") as file:
        return find_offsets(file, name=str(path), by_stem=by_stem)
