"""A part of a JPEG without the rest of it, by NVIDIA's nvImageCodec where it is installed. On the CPU.

Its decoder is the same libjpeg-turbo that others have, so the pixels are the same; it leaves out what lies
below and most of what lies beside the part. Other decoders would notice damage there, this one cannot.
"""

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cmae_scale.data.decode import Box, Size

OPTIONS = "libjpeg_turbo_decoder:fancy_upsampling=1 libjpeg_turbo_decoder:fast_idct=0"  # as Pillow has it
WORTHWHILE_SHARE = 0.75  # of the image: its decoder is slower than simplejpeg, measured on whole images
END_OF_IMAGE = b"\xff\xd9"
END_BYTES = 64  # which some cameras fill up


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
        except Exception:  # damage is for Pillow to judge
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
