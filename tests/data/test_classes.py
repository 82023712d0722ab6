"""How two lists of classes differ, in words."""

import pytest

from cmae_scale.data.shard_set import tell_apart


@pytest.mark.parametrize(
    ("classes", "others", "words"),
    [
        (("a", "b"), ("a", "b", "c"), "it lacks 'c'"),
        (("b",), ("a", "b", "c", "d"), "it lacks 'a' and 2 more"),
        (("a", "b", "x"), ("a", "b"), "it has 'x' besides"),
        (("a", "B"), ("a", "b"), "it lacks 'b', and has 'B' besides"),
        ((), ("a",), "it lacks 'a'"),
        (("b", "a"), ("a", "b"), "the same names in another order"),
    ],
)
def test_the_classes_that_differ_are_named(
    classes: tuple[str, ...], others: tuple[str, ...], words: str
) -> None:
    assert tell_apart(classes, others) == words
