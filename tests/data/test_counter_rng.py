"""Numbers of a slot: always the same, of the right kind, and not those of another slot."""

import numpy as np
import pytest

from cmae_scale.data.plan import Purpose, draw_permutation, draw_uniforms, draw_words


def test_words_are_those_of_philox_4x64_10() -> None:
    """First block of the reference implementation's known-answer test: counter and key of all ones.

    Source: Random123 kat_vectors, "philox4x64 10" (numpy raises the counter by one before the first block).
    """
    ones = 2**64 - 1
    generator = np.random.Philox(key=[ones, ones], counter=[ones - 1, ones, ones, ones])
    assert [f"{word:016x}" for word in generator.random_raw(4)] == [
        "87b092c3013fe90b",
        "438c3c67be8d0224",
        "9cc7d7c69cd777b6",
        "a09caebf594f0ba0",
    ]
    words = draw_words(5, Purpose.CROP, slot=(1, 2, 3), count=4)
    again = np.random.Philox(key=[5, 4], counter=[0, 1, 2, 3]).random_raw(4)
    np.testing.assert_array_equal(words, again)


def test_slots_purposes_and_seeds_have_numbers_of_their_own() -> None:
    slots = [
        (seed, purpose, (a, b, c))
        for seed in (0, 1)
        for purpose in Purpose
        for a in (0, 1)
        for b in (0, 1)
        for c in (0, 1)
    ]
    first = {int(draw_words(seed, purpose, slot=slot, count=1)[0]) for seed, purpose, slot in slots}
    assert len(first) == len(slots)


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    short, long = (draw_words(0, Purpose.CROP, slot=(0, 0, 0), count=count) for count in (5, 50))
    np.testing.assert_array_equal(short, long[:5])


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    numbers = draw_uniforms(0, Purpose.CROP, slot=(0, 0, 0), count=100_000)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


@pytest.mark.parametrize("count", [1, 2, 3, 256])
def test_permutations_hold_every_number_once(count: int) -> None:
    order = draw_permutation(0, Purpose.BLOCK_ORDER, slot=(0, 0, count), count=count)
    assert sorted(order.tolist()) == list(range(count))


def test_all_permutations_of_three_come_up_equally_often() -> None:
    orders = [
        tuple(draw_permutation(0, Purpose.BLOCK_ORDER, slot=(0, 0, n), count=3).tolist()) for n in range(6000)
    ]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert all(abs(count - 1000) < 150 for count in counts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [-1, -7, 2**63, 2**64 - 1])
def test_seeds_beyond_63_bits_are_taken_exactly(seed: int) -> None:
    """As numbers of one array they would become floats: all of them the same few, or none at all."""
    words = draw_words(seed, Purpose.CROP, slot=(1, 2, 3), count=4)
    np.testing.assert_array_equal(words, draw_words(seed + 2**64, Purpose.CROP, slot=(1, 2, 3), count=4))
    assert (words != draw_words(seed - 1, Purpose.CROP, slot=(1, 2, 3), count=4)).all()
