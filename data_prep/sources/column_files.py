"""Images and labels in the files of Hugging Face data sets: Arrow mapped into memory, Parquet staged."""

import functools
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cmae_scale.core.errors import DataError
from data_prep.listing import Item
from data_prep.sources.source import Read
from data_prep.sources.tables import Row

ROWS_AT_ONCE = 64  # of a Parquet row group in memory while it is staged
STAGED = struct.Struct("<QQ")  # offset and size of one image in the scratch file


def list_arrow(paths: tuple[str, ...], label: str | None) -> Iterator[Row]:
    """Rows in place (file, record batch, row)."""
    for number, path in enumerate(paths):
        name, row = Path(path).name, 0
        for position, batch in enumerate(open_arrow(path)):
            labels = [None] * len(batch) if label is None else _list_labels(batch.column(label))
            for inner, value in enumerate(labels):
                yield Row(f"{name} row {row + inner}", value, (number, position, inner))
            row += len(labels)


def _list_labels(column: Any) -> list[Any]:
    """The values of a column, None for those that are not a number: these are equal to nothing."""
    return [None if value != value else value for value in column.to_pylist()]


@functools.lru_cache(maxsize=1024)
def open_arrow(path: str) -> list[Any]:
    """The record batches of a file, mapped into memory: nothing is read until it is looked at."""
    import pyarrow

    source = pyarrow.memory_map(path)
    try:
        return list(pyarrow.ipc.open_stream(source))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}): copy it again") from None


def read_arrow(paths: tuple[str, ...], column: str, item: Item) -> bytes:
    """The image of one row."""
    number, position, row = item.place
    return _as_bytes(open_arrow(paths[number])[position].column(column)[row].as_py())


def _as_bytes(value: Any) -> bytes:
    """A path in the data set is not followed: it was somebody else's, and it could be any file of ours."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DataError("the row holds no bytes of an image (paths are not followed)")
    return data


def list_parquet(paths: tuple[str, ...], label: str | None) -> Iterator[Row]:
    """Rows in place (file, row of the file, row of all files)."""
    from pyarrow import parquet

    count = 0
    for number, path in enumerate(paths):
        with parquet.ParquetFile(path) as file:
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                labels: list[object] = [None] * rows
                if label is not None:
                    labels = _list_labels(file.read_row_group(group, columns=[label])[label])
                for value in labels:
                    yield Row(f"{Path(path).name} row {row}", value, (number, row, count))
                    row, count = row + 1, count + 1


def stage_parquet(
    paths: tuple[str, ...], column: str, rows: int, scratch: Path, items: Iterator[Item]
) -> Read:
    """Copy the images of `items`, of all `rows`, to the folder `scratch`, in one pass through the files.

    A row cannot be read without its row group, so a shuffled order would read each group again and again.
    The file `places` says where in the file `images` an item is; it has holes for those not copied.
    """
    from pyarrow import parquet

    is_wanted = bytearray(rows)
    for item in items:
        is_wanted[item.place[2]] = 1
    begin = 0  # number of the file's first item
    with (scratch / "images").open("wb") as images, (scratch / "places").open("wb") as places:
        for path in paths:
            with parquet.ParquetFile(path) as file:
                wanted_groups, ends = [], begin
                for group in range(file.num_row_groups):
                    start, ends = ends, ends + file.metadata.row_group(group).num_rows
                    if any(is_wanted[start:ends]):
                        wanted_groups.append((group, start))
                for group, start in wanted_groups:
                    batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column])
                    values = (value for batch in batches for value in batch.column(0).to_pylist())
                    for number, value in enumerate(values, start=start):
                        if is_wanted[number]:
                            data = value.get("bytes") if isinstance(value, dict) else value
                            places.seek(number * STAGED.size)
                            places.write(STAGED.pack(images.tell(), len(data or b"")))
                            images.write(data or b"")
                begin = ends
        places.truncate(rows * STAGED.size)
    return functools.partial(_read_staged, str(scratch))


def _read_staged(scratch: str, item: Item) -> bytes:
    places, images = _open_staged(scratch)
    place = os.pread(places.fileno(), STAGED.size, item.place[2] * STAGED.size)
    offset, size = STAGED.unpack(place)
    return _as_bytes(os.pread(images.fileno(), size, offset) or None)


@functools.lru_cache(maxsize=1)
def _open_staged(scratch: str) -> tuple[io.FileIO, io.FileIO]:
    return io.FileIO(f"{scratch}/places"), io.FileIO(
        f"{scratch}/images"
    )  # closed when the cache forgets them
