"""A table of paths and labels."""

import csv
import functools
from collections.abc import Iterator
from pathlib import Path

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item, Listing
from data_prep.sources.folders import read_file
from data_prep.sources.source import Source, SourceRequest


def list_csv(request: SourceRequest) -> dict[str, Source]:
    """ROOT is a CSV file with a heading: `path` (below the file's folder, or absolute), perhaps `label`.

    Labels that are all whole numbers are taken as they are; names are numbered in sorted order. An empty
    label is none.
    """
    if request.root is None:
        raise ConfigError("--source csv needs --root, the CSV file with the columns path and label")
    if not request.root.is_file():
        raise ConfigError(
            f"--root {request.root} is not a file: name the CSV file with the columns path, label"
        )
    rows = functools.partial(_read_rows, request.root, request.image_column or "path", request.label_column)
    classes = _order_classes({label for _, label in rows() if label})
    is_number = bool(classes) and classes[0] == "0"
    numbers = {name: number for number, name in enumerate(classes)}
    items = Listing(
        Item(path, None if not label else int(label) if is_number else numbers[label])
        for path, label in rows()
    )
    if not items:
        raise ConfigError(f"--root {request.root} lists no image")
    read = functools.partial(read_file, request.root.parent)
    return {"": Source(f"csv {request.root}", items, classes, read)}


def _order_classes(names: set[str]) -> tuple[str, ...]:
    if names and all(name.isdecimal() for name in names):
        return tuple(str(number) for number in range(max(map(int, names)) + 1))
    return tuple(sorted(names))


def _read_rows(path: Path, path_column: str, label_column: str | None) -> Iterator[tuple[str, str]]:
    """(path, label or "") of each row."""
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        heading = next(reader, [])
        if path_column not in heading:
            raise ConfigError(
                f"{path} has no column '{path_column}' (its first line is {','.join(heading)[:80]})"
            )
        if label_column is not None and label_column not in heading:
            raise ConfigError(f"{path} has no column '{label_column}'")
        place = heading.index(path_column)
        label = label_column or "label"
        label_place = heading.index(label) if label in heading else None
        for row in reader:
            if len(row) not in (0, len(heading)):
                raise ConfigError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, the heading has {len(heading)}"
                )
            if row:
                yield row[place], "" if label_place is None else row[label_place].strip()
