"""From an image's bytes to pixels: what may be opened, how it becomes RGB, how many may fail. No torch."""

import functools
import logging
import math
import threading
from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cmae_scale.core.errors import DataError
from cmae_scale.core.terminal import make_safe
from cmae_scale.data.image_formats import describe_content, find_format

LOG = logging.getLogger(__name__)
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of grey that 8 bits cannot hold
CROP_TRIES = 10  # Source: torchvision RandomResizedCrop.get_params
CROP_DRAWS = 2 * CROP_TRIES + 2  # area and shape of every try, then the two coordinates
EXIF_ORIENTATION = 0x0112
START_OF_SCAN = 0xDA
PLAIN_FRAMES = frozenset((0xC0, 0xC2))  # baseline, progressive
PLAIN_SEGMENTS = frozenset((0xC4, 0xDB, 0xDD, 0xFE))  # Huffman and quantization tables, restarts, comments
APPLICATION_DATA = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0"}
TURNS = {  # Source: Exif 2.3, tag 274; values outside 1..8 occur in the wild and mean nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


GreyRange = tuple[float, float]  # the values that become black and white


class Box(NamedTuple):
    """A rectangle of an image, px, in the order that Pillow's crop takes."""

    left: int
    top: int
    right: int
    bottom: int


class Size(NamedTuple):
    """Of an image, px."""

    width: int
    height: int

    def fits(self, max_mpx: float) -> bool:
        """Whether it has no more than that many million pixels."""
        return self.width * self.height / 1e6 <= max_mpx


def open_image(data: bytes, *, max_mpx: float) -> Image.Image:
    """The image with its header read and no pixel decoded yet.

    Raises DataError for what is no image, damaged headers and more than `max_mpx` million pixels: a few
    hundred bytes can announce an image that would fill the memory.
    """
    found = find_format(data)
    if found is None:
        raise DataError(f"it is {describe_content(data)}")
    try:
        image = Image.open(BytesIO(data), formats=(found.name,))
        size = Size(*image.size)
    except (UnidentifiedImageError, KeyError):  # Pillow's own text names an address in memory
        raise DataError(f"damaged header (or a Pillow that cannot read {found.name})") from None
    except Exception as error:  # Pillow's parsers raise a dozen unrelated kinds on damaged headers
        raise DataError(f"damaged header ({type(error).__name__}: {error})") from None
    if min(size) < 1:
        raise DataError(f"damaged header (it says {size.width}x{size.height} pixels)")
    if not size.fits(max_mpx):
        mpx = size.width * size.height / 1e6
        raise DataError(f"{size.width}x{size.height} is {mpx:.0f} megapixels, above the limit of {max_mpx:g}")
    return image


def decode_image(data: bytes, *, max_mpx: float, grey_range: GreyRange | None = None) -> Image.Image:
    """The whole image, upright (EXIF) and in RGB. Raises DataError if any part of it cannot be decoded.

    Transparency is dropped, not blended, as the usual image-folder loaders do; of an animation or a file of
    several pages, the first picture is taken.
    """
    return finish_image(open_image(data, max_mpx=max_mpx), grey_range=grey_range)


def finish_image(image: Image.Image, *, grey_range: GreyRange | None = None) -> Image.Image:
    """The pixels of an image whose header was read, upright and in RGB; grey of over 8 bits is scaled."""
    try:
        image.load()
        turn = read_turn(image)
        if image.mode in DEEP_MODES:
            image = scale_grey(image, grey_range=grey_range)
        return _to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # as above: any damage must count as a bad sample, not end the run
        raise DataError(f"cannot be decoded ({type(error).__name__}: {error})") from None


def scale_grey(image: Image.Image, *, grey_range: GreyRange | None) -> Image.Image:
    """Grey of 16 or 32 bits in 8: the range becomes 0..255, what lies outside is clipped.

    Without a range, that of the image itself (which is logged once): scanners fill a small part of what their
    files could hold, so that a shift by 8 bits would leave a dozen grey levels.
    """
    if grey_range is None:
        _tell_own_range()
    values: NDArray[np.floating[Any]] = np.asarray(
        image, dtype=np.float64 if image.mode == "I" else np.float32
    )
    low, high = measure_grey(image) if grey_range is None else grey_range
    scaled = (values - low) * (255 / (high - low) if high > low else 0)
    return Image.fromarray(np.nan_to_num(scaled, nan=0).clip(0, 255).round().astype(np.uint8))


@functools.cache
def _tell_own_range() -> None:
    LOG.warning(
        "grey of over 8 bits, and no index.json that says its range: each image is scaled by its own "
        "(check_shards --write_index notes the range of a set)"
    )


def measure_grey(image: Image.Image) -> GreyRange:
    """The least and the greatest finite value of an image in one of DEEP_MODES; (0, 0) if it has none."""
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def read_plain_size(data: bytes) -> Size | None:
    """The size of a JPEG whose header holds nothing but what its pixels need; None for any other image.

    Such a header cannot turn the image or damage another parser, and reading it here takes a fifth of the
    time that open_image does. Source: ITU-T T.81, annex B; JFIF 1.02 for the first segment.
    """
    size, position = None, 2
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        if marker == START_OF_SCAN:
            return size
        if marker in PLAIN_FRAMES and size is None and position + 10 <= len(data):
            bits, components = data[position + 4], data[position + 9]
            if bits != 8 or components not in (1, 3) or length != 8 + 3 * components:
                return None
            height, width = (data[at] << 8 | data[at + 1] for at in (position + 5, position + 7))
            if not (width and height):
                return None
            size = Size(width, height)
        elif marker not in PLAIN_SEGMENTS and not _is_harmless(data, position, length=length):
            return None
        position += 2 + length
    return None


def _is_harmless(data: bytes, position: int, *, length: int) -> bool:
    """Whether the segment of a JPEG there only says how dense the pixels lie, or what colour they mean."""
    start = APPLICATION_DATA.get(data[position + 1])
    return start is not None and length >= 2 + 14 and data.startswith(start, position + 4)


def is_plain_jpeg(image: Image.Image) -> bool:
    """Whether any JPEG decoder gives its pixels: grey or colour, and stored upright."""
    return image.format == "JPEG" and image.mode in ("L", "RGB") and read_turn(image) is None


def read_turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the image upright, as its metadata says; None if nothing is to be done."""
    try:
        return TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # broken metadata around good pixels: the pixels count
        return None


def random_crop_box(
    width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> Box:
    """A random part of the image: area share uniform in `scale`, width / height log-uniform in `ratio`.

    `draws` are CROP_DRAWS numbers in [0, 1). When ten tries do not fit, the largest centred box of allowed
    shape. Source: torchvision RandomResizedCrop.get_params, the same rule for the same numbers.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(CROP_TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[2 * attempt])
        shape = math.exp(low + (high - low) * draws[2 * attempt + 1])
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            top, left = int(draws[-2] * (height - tall + 1)), int(draws[-1] * (width - wide + 1))
            return Box(left, top, left + wide, top + tall)
    wide, tall = width, height
    if width / height < ratio[0]:
        tall = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        wide = max(1, round(height * ratio[1]))
    left, top = (width - wide) // 2, (height - tall) // 2
    return Box(left, top, left + wide, top + tall)


def decode_centre(
    data: bytes, *, side: int, max_mpx: float, short: int | None = None, grey_range: GreyRange | None = None
) -> UInt8[np.ndarray, "3 side side"]:
    """The centre of the image: short side resized to `short` px (default: `side`), the rest cut off.

    DataError also for an image so long and thin that it would have over `max_mpx` million pixels then.
    """
    image = decode_image(data, max_mpx=max_mpx, grey_range=grey_range)
    width, height = image.size
    short = side if short is None else short
    # the long side is truncated and the offset rounded, as torchvision's resize and center_crop do
    size = (short, short * height // width) if width <= height else (short * width // height, short)
    if not Size(*size).fits(max(max_mpx, side * side / 1e6)):
        raise DataError(f"{width}x{height} is too long and thin to be resized to {size[0]}x{size[1]}")
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P":  # palettes with transparency need the detour
        image = image.convert("RGBA")
    return image.convert("RGB")


LOG = logging.getLogger(__name__)
GRACE_SAMPLES = 10_000  # a share says nothing before this many: one bad image among the first 64 is no 1.5 %
SHOWN = 5


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
