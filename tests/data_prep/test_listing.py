"""The list of a source on disk: the same as a list in memory, of any length."""

import gc
import tracemalloc
from collections.abc import Iterator

import pytest

from data_prep.listing import Item, Listing

ITEMS = [
    Item("a/1.jpg", 0),
    Item("", None),
    Item("ünï\udcff\n\t.png", 2**40, (1, 2**50, -1)),
    Item("a/1.jpg", None, (0, 0, 5)),
]


def test_items_come_back_as_they_were() -> None:
    listing = Listing(iter(ITEMS))
    assert len(listing) == 4
    assert list(listing) == ITEMS
    assert [listing[number] for number in (0, 1, 2, 3, -1)] == [*ITEMS, ITEMS[-1]]
    assert listing[1:3] == ITEMS[1:3]
    with pytest.raises(IndexError):
        listing[4]


def test_an_empty_list_is_empty() -> None:
    assert list(Listing([])) == []
    assert not Listing([])


def test_iteration_crosses_its_buffers() -> None:
    items = [Item(str(number), number) for number in range(140_000)]
    assert list(Listing(items)) == items


def test_the_digest_sees_every_field_and_every_boundary() -> None:
    variants = [
        [Item("ab", 1), Item("c", 1)],
        [Item("a", 1), Item("bc", 1)],
        [Item("ab", 1), Item("c", None)],
        [Item("ab", 1), Item("c", 1, (0, 0, 1))],
        [Item("ab", 1)],
        [],
    ]
    assert len({Listing(items).digest for items in variants}) == len(variants)
    assert Listing(variants[0]).digest == Listing(iter(variants[0])).digest


@pytest.mark.slow
def test_memory_does_not_grow_with_the_list() -> None:
    def many(count: int) -> Iterator[Item]:
        return (Item(f"n{number:08d}/{number:020d}.JPEG", number) for number in range(count))

    peaks = []
    for count in (1_000, 30_000):
        gc.collect()
        tracemalloc.start()
        listing = Listing(many(count))
        assert sum(item.label or 0 for item in listing) == count * (count - 1) // 2
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 16e6, "two buffers of a mebibyte and one read ahead, not 30,000 items"
