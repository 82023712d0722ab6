"""From an image's bytes to pixels: what may be opened, how it becomes RGB, where crops lie. No torch."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from cmae_scale.core.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
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


class Box(NamedTuple):
    """A rectangle of an image, px, in the order that Pillow's crop takes."""

    left: int
    top: int
    right: int
    bottom: int


def image_extension(data: bytes) -> str | None:
    """The ending that these bytes deserve, whatever the file was called; None unless JPEG, PNG or WebP."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def open_image(data: bytes, *, max_mpx: float) -> Image.Image:
    """The image with its header read and no pixel decoded yet.

    Raises DataError for other formats, damaged headers and more than `max_mpx` million pixels: a few hundred
    bytes can announce an image that would fill the memory.
    """
    if image_extension(data) is None:
        raise DataError(f"not a JPEG, PNG or WebP image (begins with {data[:8]!r})")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own text names an address in memory
        raise DataError("damaged header (no decoder knows it)") from None
    except Exception as error:  # Pillow's parsers raise a dozen unrelated kinds on damaged headers
        raise DataError(f"damaged header ({type(error).__name__}: {error})") from None
    if (mpx := image.width * image.height / 1e6) > max_mpx:
        raise DataError(
            f"{image.width}x{image.height} is {mpx:.0f} megapixels, above the limit of {max_mpx:g}"
        )
    return image


def decode_image(data: bytes, *, max_mpx: float) -> Image.Image:
    """The whole image, upright (EXIF) and in RGB. Raises DataError if any part of it cannot be decoded.

    Transparency is dropped, not blended, as the usual image-folder loaders do; of an animation, the first
    picture is taken.
    """
    return finish_image(open_image(data, max_mpx=max_mpx))


def finish_image(image: Image.Image) -> Image.Image:
    """The pixels of an image whose header was read, upright and in RGB."""
    try:
        image.load()
        turn = read_turn(image)
        return _to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # as above: any damage must count as a bad sample, not end the run
        raise DataError(f"cannot be decoded ({type(error).__name__}: {error})") from None


class Size(NamedTuple):
    """Of an image, px."""

    width: int
    height: int

    def fits(self, max_mpx: float) -> bool:
        """Whether it has no more than that many million pixels."""
        return self.width * self.height / 1e6 <= max_mpx


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
        tall = round(width / ratio[0])
    elif width / height > ratio[1]:
        wide = round(height * ratio[1])
    left, top = (width - wide) // 2, (height - tall) // 2
    return Box(left, top, left + wide, top + tall)


def decode_centre(
    data: bytes, *, side: int, max_mpx: float, short: int | None = None
) -> UInt8[np.ndarray, "3 side side"]:
    """The centre of the image: short side resized to `short` px (default: `side`), the rest cut off."""
    image = decode_image(data, max_mpx=max_mpx)
    width, height = image.size
    short = side if short is None else short
    # the long side is truncated and the offset rounded, as torchvision's resize and center_crop do
    size = (short, short * height // width) if width <= height else (short * width // height, short)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(resized.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # palettes with transparency need the detour
        image = image.convert("RGBA")
    return image.convert("RGB")
