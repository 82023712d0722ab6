"""One rule for labels, whatever the source: what is none, what is a number, what is a word."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cmae_scale.core.errors import ConfigError
from data_prep.sources import labels
from data_prep.sources.labels import number_labels

CASES: dict[str, tuple[list[object], tuple[str, ...], list[int | None]]] = {
    "minus one and blanks are none": ([1, -1, None, 0], ("0", "1"), [1, None, None, 0]),
    "the same as text": (["1", "-1", " ", "0", ""], ("0", "1"), [1, None, None, 0, None]),
    "floats sort as numbers": ([0.0, 10.0, 2.0, float("nan")], tuple(map(str, range(11))), [0, 10, 2, None]),
    "their text too": (["10.0", "2.0", "-1.0", "0.0"], tuple(map(str, range(11))), [10, 2, None, 0]),
    "what pandas writes for none": (["1", "nan", "0"], ("0", "1"), [1, None, 0]),
    "numbers with zeros before": (["03", "0"], ("0", "1", "2", "3"), [3, 0]),
    "parts of one": ([0.5, 10.0, 2.5], ("0.5", "2.5", "10"), [0, 2, 1]),
    "huge ids are numbered in their order": ([10**9, 7, 10**12], ("7", str(10**9), str(10**12)), [1, 0, 2]),
    "ids beyond 64 bits": ([2**63, 3, 2**70], ("3", str(2**63), str(2**70)), [1, 0, 2]),
    "words sort as words": (["dog", "cat", "", "dog"], ("cat", "dog"), [1, 0, None, 1]),
    "numbers among words are words": (["10", "2", "cat", "0"], ("0", "10", "2", "cat"), [1, 2, 3, 0]),
    "minus one among words is none": (["cat", "-1", "dog", None], ("cat", "dog"), [0, None, 1, None]),
    "a class called nan": (["nan", "cat"], ("cat", "nan"), [1, 0]),
    "truth": ([True, False], ("0", "1"), [1, 0]),
    "a number of 5,000 digits is a word": (["9" * 5000, "1"], ("1", "9" * 5000), [1, 0]),
    "nothing": ([None, "", -1], (), [None, None, None]),
}


@pytest.mark.parametrize("case", CASES)
def test_labels_become_class_numbers(case: str) -> None:
    values, classes, expected = CASES[case]
    found = number_labels(values, place="here")
    assert found.classes == classes
    assert [found.numbers[value] for value in values] == expected  # type: ignore[index]


LABELS = st.one_of(
    st.none(),
    st.integers(-2, 2**65),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("ab 01.-e+", max_size=5),
)


@given(st.lists(LABELS, max_size=12), st.randoms())
@example([0, 0.0, "a"], random.Random(1))
@example([0.0, 0, True, 1, "a"], random.Random(2))
def test_any_labels_are_numbered_alike_in_any_order(values: list[object], shuffle: random.Random) -> None:
    first = number_labels(values, place="here")
    shuffle.shuffle(values)
    assert number_labels(values, place="here").classes == first.classes
    assert len(set(first.classes)) == len(first.classes)
    for value in values:
        number = first.numbers[value]  # type: ignore[index]
        assert number is None or 0 <= number < len(first.classes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1, 2]], "here holds lists, not one class an image: .* --no_labels"),
        ([{"a": 1}], "here holds dicts"),
        (["caf\udce9"], r"here: b'caf\\xe9' is not UTF-8: .*--encoding cp1252, which reads it as 'café'"),
    ],
)
def test_what_cannot_be_labels_is_told(values: Sequence[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        number_labels(values, place="here")


def test_an_id_for_each_image_is_no_label_and_fills_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_CLASSES", 100)
    with pytest.raises(ConfigError, match="more than 100 different labels: is it an id of the image"):
        number_labels(iter(range(10**15)), place="here")


def test_small_numbers_stay_as_they_are() -> None:
    assert number_labels([labels.PLAIN_IDS - 1], place="here").numbers == {
        labels.PLAIN_IDS - 1: labels.PLAIN_IDS - 1
    }
    assert number_labels([labels.PLAIN_IDS], place="here").numbers == {labels.PLAIN_IDS: 0}
