"""A shuffle that is computed, not stored: which item stands where is arithmetic on count and seed."""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

ROUNDS = 8  # four make a good permutation of a large range, more even out small ones
SMALLEST_HALF_BITS = 4


@dataclass(frozen=True)
class Shuffle:
    """A permutation of 0 .. count-1 fixed by `seed`, in no memory however long the list.

    Source: a balanced Feistel network (Luby and Rackoff 1988, SIAM J. Comput. 17(2)) on the smallest even
    number of bits that holds `count`, walked again from every value that falls outside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002); rounds mix with SplitMix64's finaliser (Steele et
    al., OOPSLA 2014).
    """

    count: int
    seed: int

    def find_items(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """The items at positions first .. first+count-1."""
        assert 0 <= first <= first + count <= self.count
        half_bits = max(SMALLEST_HALF_BITS, ((self.count - 1).bit_length() + 1) // 2)
        keys = np.frombuffer(hashlib.sha512(f"shuffle {self.seed}".encode()).digest(), dtype="<u8")
        items = np.arange(first, first + count, dtype=np.uint64)
        outside = np.ones(count, dtype=bool)
        while outside.any():
            items[outside] = _mix_halves(items[outside], keys[:ROUNDS], half_bits=half_bits)
            outside = items >= self.count
        return items.astype(np.int64)


def _mix_halves(
    values: UInt64[np.ndarray, " count"], keys: UInt64[np.ndarray, " rounds"], *, half_bits: int
) -> UInt64[np.ndarray, " count"]:
    """One pass of the network: every round can be undone, so no two values can meet."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_finalise(right + key) & mask)
    return (left << bits) | right


def _finalise(words: UInt64[np.ndarray, " count"]) -> UInt64[np.ndarray, " count"]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64[np.ndarray, " count"] = words ^ (words >> np.uint64(31))
    return mixed
