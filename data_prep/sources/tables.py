"""What tables have in common, be they CSV or Parquet: columns that are guessed and told, labels, splits."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from cmae_scale.core.errors import ConfigError
from data_prep.listing import NOWHERE, Item, Listing
from data_prep.sources.labels import number_labels
from data_prep.sources.source import SourceRequest

LABEL_COLUMNS = (
    *("label", "labels", "cls", "fine_label", "class", "category", "target"),
    *("class_id", "class_name", "category_id", "label_id"),
)
SPLIT_COLUMNS = ("split", "subset", "partition")


class Row(NamedTuple):
    """An image of a table with its label as it stands there."""

    name: str
    label: object
    place: tuple[int, int, int] = NOWHERE


Rows = Callable[[], Iterator[Row]]


def find_column(names: Sequence[str], known: Iterable[str]) -> str | None:
    """The first of the known columns that a table has, in whatever case and with blanks around."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name] for name in known if name in by_name), None)


def choose_label_column(names: Sequence[str], request: SourceRequest, *, place: str) -> str | None:
    """The column of the labels: the one that was named, else the one that is called like one."""
    if request.no_labels:
        return None
    if request.label_column is None:
        return find_column(names, LABEL_COLUMNS)
    column = find_column(names, (request.label_column.strip().lower(),))
    if column is None:
        raise ConfigError(f"{place} has no column '{request.label_column}' (it has {', '.join(names)})")
    return column


def say_labels(column: str | None, classes: Sequence[str], request: SourceRequest) -> tuple[str, ...]:
    """What to tell of the choice."""
    if column is not None:
        return (f"labels: column '{column.strip()}', {len(classes):,} classes",)
    if request.no_labels:
        return ()
    return (f"no labels: no column is called {', '.join(LABEL_COLUMNS)} (--label_column names another)",)


def list_tables(
    tables: Mapping[str, Rows], *, place: str, names: tuple[str, ...] | None = None
) -> tuple[dict[str, Listing], tuple[str, ...]]:
    """The items of each split and the classes of all. `names` are those of the classes, where they are known.

    Reads the labels of all tables first, to number them, and then the tables.
    """
    number: Callable[[Any], int | None]
    if names is None:
        classes, numbers = number_labels(
            (row.label for row in chain.from_iterable(rows() for rows in tables.values())), place=place
        )
        number = numbers.__getitem__
    else:
        classes, number = names, functools.partial(_check_number, classes=len(names), place=place)
    listings = {
        split: Listing(Item(row.name, number(row.label), row.place) for row in rows())
        for split, rows in tables.items()
    }
    return listings, classes


def _check_number(value: object, *, classes: int, place: str) -> int | None:
    """The class number that a value is, where a schema names the classes."""
    if value is None or (isinstance(value, int) and value < 0):
        return None
    if not isinstance(value, int) or value >= classes:
        raise ConfigError(
            f"{place} holds {value!r} where its schema names {classes:,} classes: --no_labels takes the "
            "images without"
        )
    return value
