"""The computed shuffle: a permutation, whoever computes which slice of it."""

import numpy as np
import pytest

from data_prep.shuffle import Shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 255, 256, 257, 1000, 4097, 70_001])
def test_every_item_comes_exactly_once(count: int) -> None:
    items = Shuffle(count, seed=3).find_items(0, count)
    assert np.array_equal(np.sort(items), np.arange(count))


def test_a_slice_is_computed_without_the_rest() -> None:
    shuffle = Shuffle(1234, seed=0)
    whole = shuffle.find_items(0, 1234)
    for first, count in ((0, 1), (500, 100), (1233, 1), (7, 0)):
        assert np.array_equal(shuffle.find_items(first, count), whole[first : first + count])


def test_the_order_is_pinned() -> None:
    """A change here changes every shard that anybody has made: give the index another format with it."""
    assert Shuffle(10, seed=0).find_items(0, 10).tolist() == [3, 6, 8, 2, 0, 7, 9, 1, 4, 5]
    assert Shuffle(10**12, seed=7).find_items(10**11, 3).tolist() == [
        566212240645,
        631243167563,
        732348312753,
    ]


def test_seeds_give_other_orders() -> None:
    orders = {tuple(Shuffle(20, seed=seed).find_items(0, 20).tolist()) for seed in range(-50, 50)}
    assert len(orders) == 100


def test_places_are_spread_evenly() -> None:
    """Chi-squared of (item, position) over seeds: 48 degrees of freedom for 7 items, 99.99 % below 96."""
    trials = 300
    counts = np.zeros((7, 7))
    for seed in range(trials):
        counts[np.arange(7), Shuffle(7, seed=seed).find_items(0, 7)] += 1
    expected = trials / 7
    assert ((counts - expected) ** 2 / expected).sum() < 96


def test_neighbours_are_torn_apart() -> None:
    items = Shuffle(50_000, seed=0).find_items(0, 50_000)
    steps = np.abs(np.diff(items))
    assert (steps == 1).sum() < 20, "two neighbours stay together twice in 50,000 by chance"
    assert abs(np.corrcoef(items, np.arange(50_000))[0, 1]) < 0.02
