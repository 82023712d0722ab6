"""Random numbers that belong to a place (an epoch, a block, a sample), not to whoever draws them first.

A counter-based generator gives every place its own numbers: nothing has to be replayed to reach step k, and
no rank, thread or restart can shift another's luck. Only raw 64-bit words are taken from numpy: those are
fixed by the algorithm, while numpy may change how its Generator methods use them.

Source: Philox 4x64-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import threading
from enum import IntEnum
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, UInt64

WORD = 1 << 64
BLOCK_WORDS = 4


class Purpose(IntEnum):
    """What numbers are for, so that equal places of different uses do not share them."""

    SHARD_ORDER = 1
    EPOCH_START = 2
    BLOCK_ORDER = 3
    CROP = 4
    AUGMENT = 5
    FEATURE_ORDER = 6


class _Own(threading.local):
    """A generator of each thread: setting its state takes a quarter of the time that making one does."""

    def __init__(self) -> None:
        self.generator = np.random.Philox(0)
        self.key = np.zeros(2, dtype=np.uint64)
        self.counter = np.zeros(4, dtype=np.uint64)
        self.state: Any = {
            "bit_generator": "Philox",
            "state": {"key": self.key, "counter": self.counter},
            "buffer": np.zeros(BLOCK_WORDS, dtype=np.uint64),
            "buffer_pos": BLOCK_WORDS,  # nothing is left in it
            "has_uint32": 0,
            "uinteger": 0,
        }


_OWN = _Own()


def draw_words(
    seed: int, purpose: Purpose, *, place: tuple[int, int, int], count: int
) -> UInt64[np.ndarray, " count"]:
    """`count` uniform 64-bit words of one place. `seed` counts modulo 2^64."""
    key, counter = _OWN.key, _OWN.counter
    key[0], key[1] = seed % WORD, int(purpose)
    counter[1], counter[2], counter[3] = place
    _OWN.generator.state = _OWN.state
    return np.asarray(_OWN.generator.random_raw(count))


def draw_uniforms(
    seed: int, purpose: Purpose, *, place: tuple[int, int, int], count: int
) -> Float64[np.ndarray, " count"]:
    """`count` numbers in [0, 1), multiples of 2^-53."""
    return (draw_words(seed, purpose, place=place, count=count) >> np.uint64(11)) * 2.0**-53


def draw_permutation(
    seed: int, purpose: Purpose, *, place: tuple[int, int, int], count: int
) -> Int64[np.ndarray, " count"]:
    """0 .. count-1 in random order."""
    return np.argsort(draw_words(seed, purpose, place=place, count=count), kind="stable")
