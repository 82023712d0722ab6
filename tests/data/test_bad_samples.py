"""The limit on bad samples: lenient while little was seen, strict when told to be."""

import logging

import pytest

from cmae_scale.core.errors import DataError
from cmae_scale.data.decoding import BadSamples


def test_a_share_is_judged_after_ten_thousand_samples() -> None:
    bad = BadSamples(0.001)
    for number in range(10):
        bad.add(f"a.tar/{number}", "cut")
    bad.check(10, seen=64)
    bad.check(10, seen=10_000)
    bad.add("a.tar/10", "cut")
    bad.check(11, seen=11_000)
    with pytest.raises(DataError, match=r"11 of 10000 samples.*a\.tar/0: cut.*max_bad_fraction \(0\.001\)"):
        bad.check(11, seen=10_000)


def test_with_a_share_of_zero_the_first_one_stops_the_run() -> None:
    bad = BadSamples(0.0)
    bad.check(0, seen=0)
    bad.add("a.tar/1", "cut")
    with pytest.raises(DataError, match="1 of 5 samples"):
        bad.check(1, seen=5)


def test_each_sample_is_logged_once_and_counted_every_time(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadSamples(1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            bad.add("a.tar/7", "cut")
    assert bad.count == 3
    assert bad.reasons == {"a.tar/7": "cut"}
    assert [record.getMessage() for record in caplog.records] == [
        "bad sample a.tar/7: cut (another of its shard takes its place)"
    ]


def test_new_ones_are_taken_once() -> None:
    bad = BadSamples(1.0)
    for key in ("a.tar/1", "a.tar/2", "a.tar/1"):
        bad.add(key, "cut")
    assert bad.take_new() == [("a.tar/1", "cut"), ("a.tar/2", "cut")]
    bad.add("a.tar/3", "cut")
    bad.add("a.tar/2", "cut")
    assert bad.take_new() == [("a.tar/3", "cut")]
    assert bad.take_new() == []
