"""Reading JSON that anybody may have edited: whatever stands there, one sentence says what is wrong."""

import json
import math
import re
from typing import Any

Json = dict[str, Any]

MAX_DEPTH = 100  # objects inside of one another
_INTEGERS = range(-(2**63), 2**64)  # what 64 bits can say, with or without a sign
# a name that no file can have, and halves of characters that no file can hold
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def parse_json(content: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError, in one sentence; JSONDecodeError for bad grammar.

    Refused beside that: names that stand twice in an object, numbers beyond 64 bits or, if `finite`,
    no finite ones, strings that are no text, and anything nested deeper than `MAX_DEPTH`.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    try:
        value = json.loads(
            content,
            object_pairs_hook=_build_object,
            parse_int=_read_integer,
            parse_float=_read_float if finite else None,
            parse_constant=_read_float if finite else None,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    _check_inside(value)
    return value


def parse_line(line: bytes) -> Json | None:
    """The object on a line of a log; None for a line that a kill has torn, or something else damaged."""
    try:
        value = parse_json(line, finite=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _build_object(pairs: list[tuple[str, Any]]) -> Json:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'"{twice}" stands twice in one object: keep one')
    return tree


def _read_integer(text: str) -> int:
    if len(text) > len(str(2**64)) or int(text) not in _INTEGERS:
        raise ValueError(f"a whole number of {len(text.lstrip('-'))} digits is too large for 64 bits")
    return int(text)


def _read_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _check_inside(value: Any) -> None:
    """Level by level, so that depth costs no stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [*each, *each.values()]
            elif isinstance(each, list):
                inner += each
            elif isinstance(each, str) and _UNUSABLE.search(each):
                raise ValueError(f"the text {each[:40]!r} holds what is no character")
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
