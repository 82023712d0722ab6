"""An index for tars that were made elsewhere, and where the samples of any tar begin."""

import hashlib
from pathlib import Path

from tqdm import tqdm

from cmae_scale.core.errors import DataError
from cmae_scale.data.index import INDEX_NAME, ShardIndex, ShardInfo, parse_index, write_index
from cmae_scale.data.offsets import write_offsets
from cmae_scale.data.tar import find_offsets, read_samples

READ_BYTES = 1 << 20


def index_folder(folder: Path) -> ShardIndex:
    """The index of a folder, written if it has none, and the offsets of its shards, which are written anew.

    Tars without an index are listed as they are, in the order of their names, with as many classes as their
    labels need. An index that is there is not touched. DataError at any damage.
    """
    index = parse_index(folder) if (folder / INDEX_NAME).is_file() else _make_index(folder)
    with tqdm(index.shards, unit=" shards", desc=str(folder), disable=None, leave=False) as bar:
        for shard in bar:
            path = folder / shard.name
            write_offsets(path, _find(path), sha256=shard.sha256)
    return index


def _make_index(folder: Path) -> ShardIndex:
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files to list")
    shards, labels = [], -1
    for path in tqdm(paths, unit=" shards", desc=str(folder), disable=None, leave=False):
        samples = len(_find(path)) - 1
        if samples < 1:
            raise DataError(f"{path} holds no samples: remove it")
        info = ShardInfo(path.name, samples, path.stat().st_size, hash_file(path))
        for sample in read_samples(path, first=0, count=samples, expected=info):
            labels = max(labels, -1 if sample.label is None else sample.label)
        shards.append(info)
    classes = tuple(str(number) for number in range(labels + 1))
    total = sum(shard.samples for shard in shards)
    index = ShardIndex(folder, tuple(shards), classes, total, source="tars made elsewhere", options={})
    write_index(index)
    return index


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _find(path: Path) -> list[int]:
    with path.open("rb") as file:
        return find_offsets(file, name=str(path))
