"""JSON from anybody's hand is a value or one sentence, never a traceback."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.core.strict_json import MAX_DEPTH, parse_json, parse_line

NAMES = st.text(st.characters(codec="ascii", exclude_characters="\0"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0")),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested deeper"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested deeper"),
        (b"1" * 5000, "5000 digits"),
        (b"[-" + b"9" * 5000 + b"]", "5000 digits"),
        (b"18446744073709551616", "too large"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        (b'"\\u0000"', "no character"),
        (b'{"\\ud800": 1}', "no character"),
        (b'{"a": 1, "a": 1}', '"a" stands twice'),
        (b"NaN", "no finite number"),
        (b"[1e999]", "no finite number"),
        (b"", "Expecting value"),
        (b"\0", "Expecting value"),
    ],
)
def test_what_nobody_can_use_is_told_in_one_sentence(content: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        parse_json(content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()[:-1]))
def test_any_bytes_are_a_value_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        parse_json(content)


@pytest.mark.parametrize(
    "torn", [b'{"step": 3', b"\xff", b"17", b"", b"[" * 100_000, b'{"step": ' + b"7" * 5000 + b"}"]
)
def test_a_damaged_line_of_a_log_is_none(torn: bytes) -> None:
    assert parse_line(torn) is None
    assert parse_line(b'{"step": 3, "loss": NaN}') is not None
