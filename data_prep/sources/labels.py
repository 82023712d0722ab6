"""The one rule that makes class numbers of what people write as labels, whatever the source."""

import math
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

from cmae_scale.core.errors import ConfigError

# ids below this are class numbers as they stand, so that train and val agree by themselves
PLAIN_IDS = 1 << 16
MAX_CLASSES = 1_000_000
NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")
BLANKS_OF_PANDAS = frozenset(("nan", "NaN"))
MISSING = -1


class Labels(NamedTuple):
    """The classes, and the class number of each label as it was written; None for those that say none."""

    classes: tuple[str, ...]
    numbers: Mapping[Hashable, int | None]


def number_labels(values: Iterable[object], *, place: str) -> Labels:
    """Classes for the labels of one data set. `place` says in messages where they stand.

    Nothing, blanks and -1 are no label. If all others are numbers, so are the classes: small whole ones are
    class numbers as they stand, others are numbered in their order; below 0 is none. Anything else is words,
    numbered in sorted order. ConfigError for labels that are lists, more than a million, or not UTF-8.
    """
    distinct = _collect(values, place=place)
    numbers = {value: _read_number(value) for value in distinct if not _is_blank(value)}
    present = {value for value, number in numbers.items() if number != MISSING}
    words = {value for value in present if numbers[value] is None}
    if words < present and words <= BLANKS_OF_PANDAS:
        classes, order = _order_numbers({number for number in numbers.values() if number is not None})
        return Labels(classes, {value: order.get(numbers.get(value)) for value in distinct})
    spelt = {value: decode_name(_spell(value), place=place) for value in present}
    classes = tuple(sorted(set(spelt.values())))
    by_name = {name: number for number, name in enumerate(classes)}
    return Labels(classes, {value: by_name.get(spelt.get(value, "")) for value in distinct})


def decode_name(name: str, *, place: str, encoding: str | None = None) -> str:
    """A name as the system gave it (surrogates for bytes that are not UTF-8), made text by `encoding`."""
    raw = name.encode(errors="surrogateescape")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        pass
    try:
        if encoding is not None:
            return raw.decode(encoding)
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: {raw!r} is not {encoding} either: name another --encoding") from None
    raise ConfigError(
        f"{place}: {raw!r} is not UTF-8: name its encoding, as in --encoding cp1252, "
        f"which reads it as '{raw.decode('cp1252', 'replace')}'"
    )


def _collect(values: Iterable[object], *, place: str) -> set[Hashable]:
    distinct: set[Hashable] = set()
    for value in values:
        if not isinstance(value, Hashable):
            raise ConfigError(
                f"{place} holds {type(value).__name__}s, not one class an image: name another "
                "--label_column, or write --no_labels"
            )
        distinct.add(value)
        if len(distinct) > MAX_CLASSES:
            raise ConfigError(
                f"{place} holds more than {MAX_CLASSES:,} different labels: is it an id of the image? Name "
                "another --label_column, or write --no_labels"
            )
    return distinct


def _is_blank(value: Hashable) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_number(value: Hashable) -> int | float | None:
    """The number that a label is, whole where it can be: 10.0 is 10. None for a word."""
    if isinstance(value, str):
        text = value.strip()
        if text.isdecimal() and len(text) <= 18:
            return int(text)
        value = float(text) if NUMBER.fullmatch(text) else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    return int(value) if isinstance(value, int) else None


def _spell(label: Hashable) -> str:
    """A label as the name of a class: 0 and 0.0, which are one label, have one name."""
    number = None if isinstance(label, str) else _read_number(label)
    return str(label).strip() if number is None else str(number)


def _order_numbers(found: set[int | float]) -> tuple[tuple[str, ...], Mapping[int | float | None, int]]:
    ids: list[int | float] = sorted(number for number in found if number >= 0)
    if ids and ids[-1] < PLAIN_IDS and all(isinstance(number, int) for number in ids):
        ids = list(range(int(ids[-1]) + 1))
    return tuple(str(number) for number in ids), {number: label for label, number in enumerate(ids)}
