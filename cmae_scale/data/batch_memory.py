"""Memory for batches that is used again when the last tensor on it is gone: fresh pages cost time."""

import weakref
from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


class BatchMemory:
    """Takes back what nobody holds any more, so a loader needs as much as is in use at the same time."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._free: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised uint8 tensor. Page-locked ones come from torch, which reuses them itself."""
        if self._pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        memory = self._find(prod(shape))
        lent = memory[:]  # an object of its own, which lives as long as tensors on it
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(*shape)

    def _find(self, size: int) -> np.ndarray:
        while self._free:
            memory = self._free.pop()
            if len(memory) == size:
                return memory
        return np.empty(size, dtype=np.uint8)
