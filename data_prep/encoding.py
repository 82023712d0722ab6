"""What is stored of an image: its own bytes wherever possible, and what is to be told of it."""

import contextlib
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import (
    DEEP_MODES,
    GreyRange,
    decode_image,
    measure_grey,
    open_image,
    read_plain_size,
    read_turn,
)
from cmae_scale.data.image_formats import find_format, image_extension
from data_prep.layout import Options
from data_prep.png_header import read_plain_png_size
from data_prep.stats import BANDS, DEEP, PICTURES, UPPER

MAX_MPX = 178.0  # Pillow opens nothing larger (twice its MAX_IMAGE_PIXELS). Training has its own, lower limit
QUIET_MPX = 89.0  # above, Pillow warns
DEEP_FORMATS = ("PNG", "TIFF", "JPEG2000", "PPM")  # others have no deep grey
BITS_PER_SAMPLE, SAMPLES_PER_PIXEL = 258, 277  # Source: TIFF 6.0
PNG_BITS = 24  # where a PNG says its bits per sample. Source: PNG, section 11.2.1


class Encoded(NamedTuple):
    """The bytes to store and the length of their image's shorter side, px.

    `noted` are kinds of stats.NOTES; `grey_range` are the extreme values of grey of over 8 bits.
    """

    data: bytes
    ending: str
    short_side: int
    noted: tuple[str, ...] = ()
    grey_range: GreyRange | None = None


def encode(data: bytes, options: Options) -> Encoded:
    """What to store: the original bytes wherever possible. Raises DataError if they are no image."""
    short, is_deep, noted = _read_header(data)
    is_large = options.resize_short is not None and short > options.resize_short
    if is_deep:
        return _encode_deep(data, side=options.resize_short if is_large else None, noted=noted)
    if options.resize_short is None or not is_large:
        if options.verify_pixels or options.resize_short is not None:
            decode_image(data, max_mpx=MAX_MPX)
        return Encoded(data, image_extension(data) or "", short, noted)
    upright = decode_image(data, max_mpx=MAX_MPX)
    file = io.BytesIO()
    small = upright.resize(_shrink(upright.size, options.resize_short), Image.Resampling.BICUBIC)
    small.save(file, "JPEG", quality=options.quality)
    return Encoded(file.getvalue(), "jpg", options.resize_short, noted)


class _Header(NamedTuple):
    """What the header of an image says. `noted` are kinds of stats.NOTES."""

    short_side: int
    is_deep: bool = False
    noted: tuple[str, ...] = ()


def _read_header(data: bytes) -> _Header:
    """Of any image. Raises DataError where Pillow would not open it, though most images need no Pillow."""
    size = read_plain_size(data) or read_plain_png_size(data)
    if size is not None and size.fits(QUIET_MPX):
        return _Header(min(size))
    image = open_image(data, max_mpx=MAX_MPX)
    return _Header(min(image.size), image.mode in DEEP_MODES, tuple(_find_notes(image, data)))


def find_grey_range(data: bytes) -> GreyRange | None:
    """The extremes of an image of deep grey; None for all others, and for those that are damaged."""
    found = find_format(data)
    if found is None or found.name not in DEEP_FORMATS:
        return None
    with contextlib.suppress(Exception):  # whoever decodes it says so
        image = open_image(data, max_mpx=MAX_MPX)
        if image.mode in DEEP_MODES:
            image.load()
            return measure_grey(image)
    return None


def _encode_deep(data: bytes, *, side: int | None, noted: tuple[str, ...]) -> Encoded:
    """Grey of over 8 bits, as it is or smaller but as deep: a JPEG has 8."""
    try:
        image = open_image(data, max_mpx=MAX_MPX)
        image.load()
        grey_range = measure_grey(image)
        if side is None:
            return Encoded(data, image_extension(data) or "", min(image.size), noted, grey_range)
        turn = read_turn(image)
        values = Image.fromarray(np.asarray(image, dtype=np.float32))
        values = values if turn is None else values.transpose(turn)
        small = np.asarray(values.resize(_shrink(values.size, side), Image.Resampling.BICUBIC)).clip(
            *grey_range
        )
        fits = image.mode != "F" and grey_range[0] >= 0 and grey_range[1] < 1 << 16
        file = io.BytesIO()
        if fits:
            Image.fromarray(small.round().astype(np.uint16)).save(file, "PNG")
        else:
            Image.fromarray(small).save(file, "TIFF", compression="tiff_adobe_deflate")
    except DataError:
        raise
    except Exception as error:  # as in decode: Pillow raises a dozen kinds
        raise DataError(f"cannot be decoded ({type(error).__name__}: {error})") from None
    return Encoded(file.getvalue(), "png" if fits else "tif", side, noted, grey_range)


def _shrink(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Another size of the same shape, px."""
    return round(size[0] * short / min(size)), round(size[1] * short / min(size))


def _find_notes(image: Image.Image, data: bytes) -> Iterator[str]:
    """What of the image is not used, by its header. The previews in photographs (MPO) go without a word."""
    if image.mode in DEEP_MODES:
        yield DEEP
    try:
        if image.mode not in DEEP_MODES and _read_bits(image, data) > 8:
            yield UPPER
        if image.format == "TIFF" and image.getexif().get(SAMPLES_PER_PIXEL, 1) > len(image.getbands()):
            yield BANDS
        if image.format != "MPO" and getattr(image, "is_animated", False):
            yield PICTURES
    except Exception:  # damage that only matters if the pixels are damaged too
        return


def _read_bits(image: Image.Image, data: bytes) -> int:
    """Bits of each value as they are stored, where the header says that in a known place; else 8."""
    match image.format:
        case "PNG":
            return data[PNG_BITS]
        case "TIFF":
            bits = image.getexif().get(BITS_PER_SAMPLE, 8)
            return max(bits) if isinstance(bits, tuple) else int(bits)
    return 8
