"""From an image's bytes to pixels, by the fastest decoder that is installed. No torch."""

import contextlib
import functools
import importlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cmae_scale.core.errors import DataError
from cmae_scale.data.image_formats import describe_content, find_format

LOG = logging.getLogger(__name__)
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow's, of grey that 8 bits cannot hold
CROP_TRIES = 10  # Source: torchvision RandomResizedCrop.get_params
CROP_DRAWS = 2 * CROP_TRIES + 2  # area and shape of every try, then the two coordinates
EXIF_ORIENTATION = 0x0112
START_OF_SCAN, QUANTIZATION = 0xDA, 0xDB
PLAIN_FRAMES = frozenset((0xC0, 0xC2))  # baseline, progressive
PLAIN_SEGMENTS = frozenset((0xC4, 0xDD, 0xFE))  # Huffman tables, restarts, comments
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


Pixels = UInt8[np.ndarray, "height width 3"]


class _Scratch(threading.local):
    """Memory that a thread decodes into again and again: new pages for every image cost 5 % of its time."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def take(self, size: int) -> bytearray:
        """At least `size` bytes, with what was there before."""
        if len(self._memory) < size:
            self._memory = bytearray(size)
        return self._memory


def find_jpeg_decoder() -> Callable[..., Any] | None:
    """From a JPEG's bytes to RGB pixels, ValueError at any doubt; None if only Pillow is installed."""
    try:
        return importlib.import_module("simplejpeg").decode_jpeg  # type: ignore[no-any-return]
    except ImportError:
        return None


DECODE_JPEG = find_jpeg_decoder()
_SCRATCH = _Scratch()


def decode_pixels(data: bytes, *, max_mpx: float, grey_range: GreyRange | None = None) -> Pixels:
    """The whole image, upright and in RGB, until the same thread decodes another one. Raises DataError.

    The header is checked before anything is decoded. What the fast decoder does not take, or has doubts
    about, is for Pillow to decide, so that it does not depend on installed packages which images are bad.
    """
    if DECODE_JPEG is not None and (size := _measure_plain(data, max_mpx=max_mpx)) is not None:
        with contextlib.suppress(Exception):  # damage is for Pillow to decide
            return np.asarray(DECODE_JPEG(data, buffer=_SCRATCH.take(3 * size.width * size.height)))
    image = open_image(data, max_mpx=max_mpx)
    upright = finish_image(image, grey_range=grey_range)
    return np.array(upright)  # its own memory: torch takes none that is read-only


def _measure_plain(data: bytes, *, max_mpx: float) -> Size | None:
    """The size of a JPEG that is stored upright, grey or in colour; None for what only Pillow should open."""
    size = read_plain_size(data)
    if size is not None and size.fits(max_mpx):
        return size
    image = open_image(data, max_mpx=max_mpx)
    return Size(*image.size) if is_plain_jpeg(image) else None


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

    Such a header cannot turn the image, open_image takes it too, and reading it here takes a tenth of
    open_image's time. Source: ITU-T T.81, annex B; JFIF 1.02 for the first segment.
    """
    size, position = None, 2
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], data[position + 2] << 8 | data[position + 3]
        if marker == START_OF_SCAN:
            return size if position + 2 + length <= len(data) else None
        if marker in PLAIN_FRAMES and size is None and position + 10 <= len(data):
            bits, components = data[position + 4], data[position + 9]
            if bits != 8 or components not in (1, 3) or length != 8 + 3 * components:
                return None
            height, width = (data[at] << 8 | data[at + 1] for at in (position + 5, position + 7))
            if not (width and height):
                return None
            size = Size(width, height)
        elif marker == QUANTIZATION:
            if not _has_whole_tables(data[position + 4 : position + 2 + length]):
                return None
        elif marker not in PLAIN_SEGMENTS and not _is_harmless(data, position, length=length):
            return None
        position += 2 + length
    return None


def _has_whole_tables(segment: bytes) -> bool:
    """Whether quantization tables, of 64 values of 8 or 16 bits after a byte that says which, fill it."""
    while segment:
        size = 1 + 64 * (1 if segment[0] < 16 else 2)
        if len(segment) < size:
            return False
        segment = segment[size:]
    return True


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
