"""Master images: random resized crops of the stored images, by the fastest decoder that is installed.

All decoders give the same pixels (libjpeg-turbo with its accurate transform), so which of them is there
changes no result. Where nvImageCodec is installed, only the part of a JPEG that becomes the crop is decoded
(see regions): 1.0 ms of CPU time for an ImageNet file instead of simplejpeg's 1.2; the resize takes 0.2.
Pillow alone takes 2.9. Torch's antialiased bicubic differs from Pillow's by 1 of 255 in 3 % of the values and
by more in 0.02 %.

All of this is numpy's but for the resize: torch gives the interpreter lock away in every operation, however
small, and copies with as many threads as the machine has cores. Fourteen decoding threads on 16 cores waited
for the lock most of the time.
"""

import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from cmae_scale.data.decode import (
    Box,
    GreyRange,
    Size,
    decode_pixels,
    random_crop_box,
    read_plain_size,
)

OPTIONS = "libjpeg_turbo_decoder:fancy_upsampling=1 libjpeg_turbo_decoder:fast_idct=0"  # as Pillow has it
WORTHWHILE_SHARE = 0.75  # of the image: its decoder is slower than simplejpeg, measured on whole images
END_OF_IMAGE = b"\xff\xd9"
END_BYTES = 64  # which some cameras fill up
# what functional.interpolate calls, which takes no `out` and would cost a copy of every crop
UPSAMPLE = torch.ops.aten._upsample_bicubic2d_aa.out


class RegionDecoders:
    """One decoder for each thread, made when it is first used."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._lock = threading.Lock()

    def decode(self, data: bytes, box: Box) -> UInt8[np.ndarray, "height width 3"] | None:
        """The pixels in the box, in RGB; None if they cannot be had so, or the file's end is lost."""
        if END_OF_IMAGE not in data[-END_BYTES:]:
            return None
        if not hasattr(self._own, "decoder"):
            self._own.decoder = self._start()
        if (decoder := self._own.decoder) is None:
            return None
        codec, decode = decoder
        try:
            region = codec.Region(box.top, box.left, box.bottom, box.right)
            image = decode(codec.CodeStream(data).get_sub_code_stream(region=region))
        except Exception:  # damage is for Pillow to decide
            return None
        if image is None or image.shape != (box.bottom - box.top, box.right - box.left, 3):
            return None
        return np.asarray(image)

    def _start(self) -> tuple[Any, Any] | None:
        """The package and a decoder's method, None if it is not installed or does not run here."""
        with self._lock, _silence():  # it complains to the terminal that there is no GPU
            try:
                codec = importlib.import_module("nvidia.nvimgcodec")
                backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
                decoder = codec.Decoder(
                    device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                    max_num_cpu_threads=1,
                    backends=backends,
                    options=OPTIONS,
                )
            except Exception:  # a wheel for another CUDA, a missing symbol: there are decoders enough
                return None
        return codec, decoder.decode


def is_worthwhile(box: Box, size: Size) -> bool:
    """Whether decoding the box alone is faster than decoding the whole image."""
    share = (box.right - box.left) * (box.bottom - box.top) / (size.width * size.height)
    return share <= WORTHWHILE_SHARE


@contextmanager
def _silence() -> Iterator[None]:
    """What C code writes to standard error meanwhile is lost."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


REGIONS = RegionDecoders()


def decode_crops(
    data: bytes,
    *,
    side: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    max_mpx: float,
    draws: Sequence[Sequence[float]],
    grey_range: GreyRange | None = None,
    out: UInt8[np.ndarray, "crops side side 3"] | None = None,
) -> UInt8[np.ndarray, "crops side side 3"]:
    """One random resized crop of the image per row of `draws` (see random_crop_box), decoded once.

    Cropped first and resized then, so nothing outside of a crop leaks into its border. Bicubic, antialiased.
    They go to `out` if it is given. Raises DataError if any part of the image cannot be decoded.
    """

    def choose_box(width: int, height: int, numbers: Sequence[float]) -> Box:
        return random_crop_box(width, height, scale=scale, ratio=ratio, draws=numbers)

    crops = np.empty((len(draws), side, side, 3), dtype=np.uint8) if out is None else out
    if len(draws) == 1 and (size := read_plain_size(data)) is not None and size.fits(max_mpx):
        box = choose_box(*size, draws[0])
        if is_worthwhile(box, size) and (part := REGIONS.decode(data, box)) is not None:
            resize(part, out=crops[0])
            return crops
    pixels = decode_pixels(data, max_mpx=max_mpx, grey_range=grey_range)
    height, width, _ = pixels.shape
    for number, numbers in enumerate(draws):
        box = choose_box(width, height, numbers)
        resize(pixels[box.top : box.bottom, box.left : box.right], out=crops[number])
    return crops


def resize(pixels: UInt8[np.ndarray, "height width 3"], *, out: UInt8[np.ndarray, "side side 3"]) -> None:
    """Write the image to `out`, at its size."""
    UPSAMPLE(_as_planes(np.ascontiguousarray(pixels)), out.shape[:2], False, None, None, out=_as_planes(out))


def _as_planes(pixels: UInt8[np.ndarray, "height width 3"]) -> UInt8[torch.Tensor, "1 3 height width"]:
    """The same memory, in which torch sees that channels lie last: a third faster."""
    return torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
