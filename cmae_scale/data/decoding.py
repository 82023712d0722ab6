"""What a stored image becomes in a batch, the memory of batches, and how many images may fail."""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae_scale.config.cmae import ViewsConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import make_safe
from cmae_scale.data.crops import decode_crops
from cmae_scale.data.decode import CROP_DRAWS, GreyRange, decode_centre
from cmae_scale.data.plan import Purpose, draw_uniforms

LOG = logging.getLogger(__name__)
GRACE_SAMPLES = 10_000  # a share says nothing before this many: one bad image among the first 64 is no 1.5 %
SHOWN = 5


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


Pixels = UInt8[np.ndarray, "crops side side 3"]


@dataclass(frozen=True)
class SampleSlot:
    """What random numbers of a sample belong to: not the thread, rank or row that it is decoded for."""

    seed: int
    epoch: int
    number: int

    def draw(self, purpose: Purpose, *, count: int, crop: int = 0) -> list[float]:
        """`count` numbers in [0, 1) for one purpose."""
        slot = (self.epoch, self.number, crop)
        numbers: list[float] = draw_uniforms(self.seed, purpose, slot=slot, count=count).tolist()
        return numbers


class Decoding(Protocol):
    """Turns the bytes of one image into `crops` pictures of `side` px. DataError for an image it cannot."""

    @property
    def crops(self) -> int:
        """Pictures of each image."""

    @property
    def side(self) -> int:
        """Their side, px."""

    def decode(
        self, data: bytes, slot: SampleSlot, *, out: Pixels, grey_range: GreyRange | None = None
    ) -> None:
        """Write the pictures, RGB, to `out`.

        `grey_range` are the values of grey of over 8 bits that become black and white; None: its extremes.
        """


@dataclass(frozen=True)
class PretrainCrops:
    """The crops that both views of pre-training are cut from: two where the target is a crop of its own."""

    views: ViewsConfig
    max_mpx: float

    @property
    def crops(self) -> int:
        """Master images per sample."""
        return 2 if self.views.target_crop == "random" else 1

    @property
    def side(self) -> int:
        """Side of a master, px."""
        return self.views.master_px

    def decode(
        self, data: bytes, slot: SampleSlot, *, out: Pixels, grey_range: GreyRange | None = None
    ) -> None:
        """Random resized crops."""
        decode_crops(
            data,
            side=self.side,
            scale=self.views.crop_scale,
            ratio=self.views.crop_ratio,
            max_mpx=self.max_mpx,
            grey_range=grey_range,
            draws=[slot.draw(Purpose.CROP, count=CROP_DRAWS, crop=crop) for crop in range(self.crops)],
            out=out,
        )


@dataclass(frozen=True)
class CentreCrops:
    """The centre of the image after its short side was resized. Source: timm transforms_imagenet_eval."""

    crop: CropConfig
    max_mpx: float
    crops: int = 1

    @property
    def side(self) -> int:
        """Side of the centre, px."""
        return self.crop.img_px

    def decode(
        self, data: bytes, slot: SampleSlot, *, out: Pixels, grey_range: GreyRange | None = None
    ) -> None:
        """One centre; nothing is random."""
        centre = decode_centre(
            data, side=self.side, short=self.crop.short_px, max_mpx=self.max_mpx, grey_range=grey_range
        )
        out[0] = centre.transpose(1, 2, 0)


Allocate = Callable[[int], torch.Tensor]


def allocate_for(decoding: Decoding, *, pin: bool) -> Allocate:
    """From a number of rows to memory for their pictures; `pin` makes it page-locked, for copies to a GPU."""

    memory = BatchMemory(pin=pin)

    def allocate(rows: int) -> torch.Tensor:  # channels last, as decoders write them
        shape = (rows, decoding.crops, decoding.side, decoding.side, 3)
        return memory.take(shape).permute(0, 1, 4, 2, 3)

    return allocate


class BadSamples:
    """How often a bad image came up, and which ones they are. Threads may add at the same time."""

    def __init__(
        self, max_fraction: float, *, consequence: str = "another of its shard takes its place"
    ) -> None:
        self.max_fraction = max_fraction
        self.consequence = consequence
        self.count = 0
        self.reasons: dict[str, str] = {}  # by sample, in the order first seen
        self._new: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def add(self, key: str, reason: str) -> None:
        """Count the sample `key` ("shard/key"). Logged the first time only, for it returns in every epoch."""
        with self._lock:
            self.count += 1
            is_new = key not in self.reasons
            if is_new:
                self.reasons[key] = reason
                self._new.append((key, reason))
        if is_new:
            LOG.warning(make_safe(f"bad sample {key}: {reason} ({self.consequence})"))

    def take_new(self) -> list[tuple[str, str]]:
        """Samples and reasons that were not taken before."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def check(self, count: int, *, seen: int) -> None:
        """Raise DataError when `count` bad ones are more than `max_fraction` of `seen` samples.

        Both are of all ranks, so that all raise at the same step.
        """
        if count > self.max_fraction * max(seen, GRACE_SAMPLES):
            shown = "; ".join(f"{key}: {reason}" for key, reason in list(self.reasons.items())[:SHOWN])
            raise DataError(
                f"{count} of {seen} samples could not be decoded ({shown or 'by other ranks'}): see "
                "bad_samples.jsonl in the run folder, run check_shards.py, or raise "
                f"cmae.data.max_bad_fraction ({self.max_fraction:g})"
            )
