"""A table of paths and labels."""

import codecs
import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cmae_scale.core.errors import ConfigError
from data_prep.sources.folders import read_file
from data_prep.sources.source import IMAGE_ENDINGS, Source, SourceRequest, say_kind
from data_prep.sources.splits import find_role
from data_prep.sources.tables import (
    SPLIT_COLUMNS,
    Row,
    Rows,
    choose_label_column,
    find_column,
    list_tables,
    say_labels,
)

PATH_COLUMNS = (
    *("path", "image", "file", "filename", "file_name", "filepath", "image_path", "img"),
    *("image_id", "image_file"),
)
DELIMITERS = ",;\t"
BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def list_csv(request: SourceRequest) -> dict[str, Source]:
    """ROOT is a CSV file with a heading: `path` (below the file's folder, or absolute), perhaps `label`.

    Other usual names of these columns are taken too, and told. A column `split` that says train, val or test
    gives each its own set.
    """
    if request.root is None:
        raise ConfigError("--source csv needs --root, the CSV file with the columns path and label")
    if not request.root.is_file():
        raise ConfigError(
            f"--root {request.root} is not a file: name the CSV file with the columns path, label"
        )
    table = _open_table(request.root, request)
    column = choose_label_column(table.heading, request, place=str(request.root))
    tables = _find_tables(table, column, request)
    listings, classes = list_tables(tables, place=f"{request.root}: column '{column}'")
    if not any(listings.values()):
        raise ConfigError(f"--root {request.root} lists no image")
    read = functools.partial(read_file, request.root.parent)
    notes = (f"images: column '{table.image.strip()}'", *say_labels(column, classes, request))
    return {
        split: Source(f"csv {request.root} {split}".strip(), items, classes, read, notes=notes)
        for split, items in listings.items()
    }


class _Table(NamedTuple):
    """How a CSV file is to be read: `has_blanks` after its delimiters, the paths in the column `image`."""

    path: Path
    encoding: str
    errors: str
    delimiter: str
    has_blanks: bool
    heading: tuple[str, ...]
    image: str

    def read_lines(self) -> Iterator[list[str]]:
        """The fields of each line below the heading."""
        try:
            with self.path.open(newline="", encoding=self.encoding, errors=self.errors) as file:
                reader = csv.reader(file, delimiter=self.delimiter, skipinitialspace=self.has_blanks)
                next(reader)
                for fields in reader:
                    if len(fields) not in (0, len(self.heading)):
                        raise ConfigError(
                            f"{self.path}: line {reader.line_num} has {len(fields)} fields, the heading has "
                            f"{len(self.heading)}"
                        )
                    if fields:
                        yield fields
        except (csv.Error, UnicodeError) as error:
            raise _unreadable(self.path, error) from None

    def read_rows(self, label: str | None, *, split: tuple[str, str] | None) -> Iterator[Row]:
        """Path and label of each line; of those only whose column split[0] says split[1]."""
        path_at = self.heading.index(self.image)
        label_at = None if label is None else self.heading.index(label)
        split_at = None if split is None else self.heading.index(split[0])
        for fields in self.read_lines():
            if split is None or split_at is None or fields[split_at].strip() == split[1]:
                yield Row(fields[path_at], "" if label_at is None else fields[label_at])


def _open_table(path: Path, request: SourceRequest) -> _Table:
    with path.open("rb") as file:
        has_mark = file.read(2) in BYTE_ORDER_MARKS
    encoding = request.encoding or ("utf-16" if has_mark else "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"  # paths need not be text
    if (kind := say_kind(path)) is not None:
        raise ConfigError(kind)
    try:
        with path.open(newline="", encoding=encoding, errors=errors) as file:
            first = next(iter(file), "")
        if "\0" in first:
            raise csv.Error("it holds NUL characters")
        headings = [
            tuple(next(csv.reader([first], delimiter=delimiter, skipinitialspace=True), ()))
            for delimiter in DELIMITERS
        ]
    except (csv.Error, UnicodeError) as error:
        raise _unreadable(path, error) from None
    known = PATH_COLUMNS if request.image_column is None else (request.image_column.strip().lower(),)
    for delimiter, heading in zip(DELIMITERS, headings, strict=True):
        if (image := find_column(heading, known)) is not None:
            has_blanks = f"{delimiter} " in first
            return _Table(path, encoding, errors, delimiter, has_blanks, heading, image)
    raise ConfigError(_say_no_column(path, headings[0], known[0]))


def _find_tables(table: _Table, label: str | None, request: SourceRequest) -> dict[str, Rows]:
    """The rows of each split that a column says; all in one if none does."""
    column = None if request.merge_splits else find_column(table.heading, SPLIT_COLUMNS)
    values: dict[str, None] = {}
    if column is not None:
        at = table.heading.index(column)
        for fields in table.read_lines():
            values[fields[at].strip()] = None
            if not find_role(fields[at].strip()):
                break  # the column says something else
    if len(values) < 2 or not all(find_role(value) for value in values):
        return {"": functools.partial(table.read_rows, label, split=None)}
    assert column is not None
    return {value: functools.partial(table.read_rows, label, split=(column, value)) for value in values}


def _say_no_column(path: Path, heading: tuple[str, ...], column: str) -> str:
    first = ",".join(heading)[:80]
    if any(name.lower().endswith(IMAGE_ENDINGS) for name in heading):
        return f"{path} has no column names (its first line is {first}): put a line 'path,label' above it"
    return f"{path} has no column '{column}' (its first line is {first}): name theirs with --image_column"


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read as text ({error}): name its --encoding, such as utf-16 or cp1252"
    )
