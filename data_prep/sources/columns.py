"""Hugging Face data sets: a folder written by save_to_disk (Arrow), or Parquet files. Needs pyarrow only."""

import functools
import io
import json
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cmae_scale.core.errors import ConfigError, DataError
from data_prep.listing import Item, Listing
from data_prep.sources.source import Read, Source, SourceRequest, number_classes

LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
ROWS_AT_ONCE = 64  # of a Parquet row group in memory while it is staged
STAGED = struct.Struct("<QQ")  # offset and size of one image in the scratch file


class Columns(NamedTuple):
    """Which columns are the image and the label, and the names of the classes if the schema has them."""

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def list_huggingface(request: SourceRequest) -> dict[str, Source]:
    """ROOT: what `save_to_disk` wrote, a Parquet file, or a folder of them, with its splits."""
    if request.root is None:
        raise ConfigError("--source huggingface needs --root, a save_to_disk folder or Parquet files")
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError('--source huggingface needs pyarrow: pip install "cmae-scale[datasets]"') from None
    splits = _find_splits(request.root)
    return {
        split if len(splits) > 1 else "": _list_files(
            paths, request, title=f"huggingface {request.root} {split}".strip()
        )
        for split, paths in splits.items()
    }


def _find_splits(root: Path) -> dict[str, list[Path]]:
    """The files of each split, in order."""
    if root.is_file():
        return {"": [root]}
    if (root / "dataset_dict.json").exists():
        names = json.loads((root / "dataset_dict.json").read_bytes())["splits"]
        return {name: _read_state(root / name) for name in names}
    if (root / "state.json").exists():
        return {"": _read_state(root)}
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((*root.glob("*.parquet"), *root.glob("data/*.parquet"))):
        name = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}.*", path.stem)
        splits[name[1] if name else ""].append(path)
    if not splits:
        raise ConfigError(
            f"--root {root} holds neither a data set written by save_to_disk nor a *.parquet file"
        )
    return dict(splits)


def _read_state(folder: Path) -> list[Path]:
    """The Arrow files of one split. Their names come from a file, so they must not lead elsewhere."""
    names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    if any(Path(name).name != name for name in names):
        raise DataError(f"{folder}/state.json names files outside of its folder")
    return [folder / name for name in names]


def _list_files(paths: list[Path], request: SourceRequest, *, title: str) -> Source:
    columns = _choose_columns(_read_schema(paths[0]), request, paths[0])
    names = tuple(str(path) for path in paths)
    is_parquet = paths[0].suffix == ".parquet"
    list_rows = _list_parquet if is_parquet else _list_arrow
    try:
        items = Listing(list_rows(names, columns))
    except (KeyError, TypeError) as error:
        raise DataError(f"{title}: column {error} is not the same in all files") from None
    if not items:
        raise ConfigError(f"{title} holds no row")
    classes = number_classes(items) if columns.classes is None else columns.classes
    read = functools.partial(_read_arrow, names, columns.image)
    stage = functools.partial(_stage_parquet, names, columns.image, len(items)) if is_parquet else None
    return Source(title, items, classes, read, stage)


def _read_schema(path: Path) -> Any:
    import pyarrow

    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_schema(path)
        return _open_arrow(str(path))[0].schema
    except (pyarrow.ArrowInvalid, OSError, IndexError) as error:
        raise DataError(f"{path} cannot be read ({error}): copy it again") from None


def _choose_columns(schema: Any, request: SourceRequest, path: Path) -> Columns:
    import pyarrow

    def is_image(field: Any) -> bool:
        kind = field.type
        if pyarrow.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))

    candidates = [field.name for field in schema if is_image(field)]
    image = request.image_column or (candidates[0] if len(candidates) == 1 else None)
    if image is None or image not in candidates:
        known = ", ".join(candidates) or "none"
        raise ConfigError(f"{path}: write --image_column NAME (columns that hold encoded images: {known})")
    label = request.label_column or next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if label is not None:
        if label not in schema.names:
            raise ConfigError(f"{path} has no column '{label}' (it has {', '.join(schema.names)})")
        if not pyarrow.types.is_integer(schema.field(label).type):
            raise ConfigError(f"{path}: column '{label}' holds no class numbers: name another --label_column")
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(label) or {}
    names = feature.get("names")
    return Columns(image, label, tuple(names) if names else None)


def _as_label(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _list_arrow(paths: tuple[str, ...], columns: Columns) -> Iterator[Item]:
    """Items in place (file, record batch, row)."""
    for number, path in enumerate(paths):
        name, row = Path(path).name, 0
        for position, batch in enumerate(_open_arrow(path)):
            labels = [None] * len(batch) if columns.label is None else batch.column(columns.label).to_pylist()
            for inner, label in enumerate(labels):
                yield Item(f"{name} row {row + inner}", _as_label(label), (number, position, inner))
            row += len(labels)


@functools.lru_cache(maxsize=1024)
def _open_arrow(path: str) -> list[Any]:
    """The record batches of a file, mapped into memory: nothing is read until it is looked at."""
    import pyarrow

    source = pyarrow.memory_map(path)
    try:
        return list(pyarrow.ipc.open_stream(source))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is damaged ({error}): copy it again") from None


def _read_arrow(paths: tuple[str, ...], column: str, item: Item) -> bytes:
    number, position, row = item.place
    return _as_bytes(_open_arrow(paths[number])[position].column(column)[row].as_py())


def _as_bytes(value: Any) -> bytes:
    """A path in the data set is not followed: it was somebody else's, and it could be any file of ours."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise DataError("the row holds no bytes of an image (paths are not followed)")
    return data


def _list_parquet(paths: tuple[str, ...], columns: Columns) -> Iterator[Item]:
    """Items in place (file, row of the file, number of the item)."""
    from pyarrow import parquet

    count = 0
    for number, path in enumerate(paths):
        with parquet.ParquetFile(path) as file:
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                labels: list[int | None] = [None] * rows
                if columns.label is not None:
                    labels = file.read_row_group(group, columns=[columns.label])[columns.label].to_pylist()
                for label in labels:
                    yield Item(f"{Path(path).name} row {row}", _as_label(label), (number, row, count))
                    row, count = row + 1, count + 1


def _stage_parquet(
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
