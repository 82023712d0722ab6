"""Every format of the table: found by content, decoded, and never worse than a DataError."""

import contextlib
import functools
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmae_scale.core.errors import DataError
from cmae_scale.data.crops import decode_crops
from cmae_scale.data.decode import CROP_DRAWS, decode_centre, decode_image
from cmae_scale.data.image_formats import FORMATS, image_extension
from cmae_scale.data.plan import Purpose, draw_uniforms

LOSSLESS = {"PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"}
OPTIONS: dict[str, dict[str, object]] = {"WEBP": {"lossless": True}}
MAX_MPX = 1.0
NUMBERS = [draw_uniforms(7, Purpose.CROP, slot=(0, 0, 0), count=CROP_DRAWS).tolist()]


def picture(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep(low: int, high: int, *, dtype: str = "uint16") -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 32 * 32).reshape(32, 32).astype(dtype))


def grey_levels(data: bytes, grey_range: tuple[float, float] | None = None) -> list[int]:
    pixels = np.asarray(decode_image(data, max_mpx=MAX_MPX, grey_range=grey_range))
    assert (pixels == pixels[..., :1]).all()
    return np.unique(pixels).tolist()


@pytest.mark.parametrize("form", [each.name for each in FORMATS])
def test_a_format_is_known_by_its_content_and_decoded(form: str) -> None:
    image = picture()
    data = encode(image, form, **OPTIONS.get(form, {}))
    assert image_extension(data) == next(each.endings[0] for each in FORMATS if each.name == form)
    decoded = decode_image(data, max_mpx=MAX_MPX)
    assert (decoded.mode, decoded.size) == ("RGB", image.size)
    if form in LOSSLESS:
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "AVIF", "PNG"])
def test_of_several_pictures_the_first_is_taken(form: str) -> None:
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    data = encode(first, form, save_all=True, append_images=[second])
    red, _, blue = np.asarray(decode_image(data, max_mpx=MAX_MPX))[9, 9].tolist()
    assert red > 200
    assert blue < 50


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (bytes(600), "nothing but zeros"),
        (b"\x1f\x8b\x08\0\0\0", "compressed with gzip: unpack it"),
        (b"PK\x03\x04....", "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\n<!DOCTYPE html><html>404", "web page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"what is this", r"begins with b'what is '"),
    ],
)
def test_a_file_that_is_no_image_is_called_what_it_is(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        decode_image(data, max_mpx=MAX_MPX)


@pytest.mark.parametrize(
    ("form", "dtype", "low", "high"),
    [
        ("PNG", "uint16", 209, 2999),
        ("TIFF", "uint16", 209, 2999),
        ("JPEG2000", "uint16", 209, 2999),
        ("PPM", "uint16", 209, 2999),
        ("TIFF", "int32", -1000, 70_000),
        ("TIFF", "float32", -3, 300),
    ],
)
def test_deep_grey_keeps_its_levels_whatever_part_of_the_type_it_fills(
    form: str, dtype: str, low: int, high: int
) -> None:
    data = encode(deep(low, high, dtype=dtype), form)
    assert grey_levels(data) == list(range(256))


def test_deep_grey_is_scaled_by_the_range_that_is_given_and_clipped() -> None:
    data = encode(deep(0, 4000), "PNG")
    assert len(grey_levels(data, (0, 8000))) == 129  # its lower half
    assert grey_levels(data, (4000, 8000)) == [0]
    assert grey_levels(data, (-10, -5)) == [255]
    assert grey_levels(encode(deep(7, 7), "PNG")) == [0]


def test_values_that_are_no_numbers_are_black() -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    values[0, :3] = np.nan, np.inf, -np.inf
    decoded = np.asarray(decode_image(encode(Image.fromarray(values), "TIFF"), max_mpx=MAX_MPX))
    assert decoded[0, :3, 0].tolist() == [0, 255, 0]
    assert decoded[7, 7, 0] == 255


def test_an_image_that_its_resize_would_make_enormous_is_refused() -> None:
    with pytest.raises(DataError, match="too long and thin"):
        decode_centre(encode(Image.new("L", (20_000, 1)), "PNG"), side=224, max_mpx=50.0)


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encode(picture(), "JPEG"))
    location = data.index(b"\xff\xc0") + 5
    data[location : location + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(("width", "height"), [(40, 0), (0, 30), (0, 0)])
def test_a_header_that_says_no_pixels_is_a_data_error_for_every_decoder(width: int, height: int) -> None:
    decode_everywhere(jpeg_with_size(40, 30))
    for decode in DECODERS:
        with pytest.raises(DataError):
            decode(jpeg_with_size(width, height))


def _decode_crop(data: bytes) -> None:
    decode_crops(data, side=16, scale=(0.2, 1.0), ratio=(0.75, 4 / 3), max_mpx=MAX_MPX, draws=NUMBERS)


DECODERS = (
    functools.partial(decode_image, max_mpx=MAX_MPX),
    functools.partial(decode_centre, side=16, max_mpx=MAX_MPX),
    _decode_crop,
)


def decode_everywhere(data: bytes) -> None:
    for decode in DECODERS:
        decode(data)


EXIF = Image.Exif()
EXIF[0x0112] = 6
EXIF[0x010E] = "a description"


@functools.cache
def originals() -> dict[str, bytes]:
    """A file of each format, and the awkward kinds of some."""
    image = picture(50, 40)
    takes_exif = {"JPEG", "PNG", "WEBP", "TIFF", "AVIF"}
    plain = {
        each.name: encode(image, each.name, **({"exif": EXIF} if each.name in takes_exif else {}))
        for each in FORMATS
    }
    return plain | {
        "JPEG plain": encode(image, "JPEG"),
        "JPEG progressive": encode(image.convert("CMYK"), "JPEG", progressive=True),
        "PNG 16": encode(deep(209, 2999), "PNG"),
        "PNG palette": encode(image.convert("P"), "PNG", transparency=bytes(range(256))),
        "TIFF 16": encode(deep(209, 2999), "TIFF", compression="tiff_lzw"),
        "TIFF float": encode(deep(0, 9, dtype="float32"), "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": encode(image, "TIFF", compression="jpeg"),
        "GIF animated": encode(image, "GIF", save_all=True, append_images=[picture(50, 40, seed=1)]),
        "BMP palette": encode(image.convert("P"), "BMP"),
    }


Changes = list[tuple[float, int]]
CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
CUTS = st.floats(0.02, 1)


def damage(data: bytes, changes: Changes, *, span: float, cut: float) -> bytes:
    """Bytes set within the first `span` of a file, of which only the share `cut` is left."""
    damaged = bytearray(data)
    for location, value in changes:
        damaged[int(location * span * len(damaged))] = value
    return bytes(damaged[: max(1, int(cut * len(damaged)))])


def check_damaged(form: str, changes: Changes, *, span: float, cut: float) -> None:
    data = damage(originals()[form], changes, span=span, cut=cut)
    for decode in DECODERS:
        with contextlib.suppress(DataError):
            decode(data)


FORMS = st.sampled_from(sorted(originals()))
SPANS = st.sampled_from([0.02, 0.1, 1.0])  # the header, what is about it, anywhere
QUIETLY = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning")


@QUIETLY
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(form=FORMS, changes=CHANGES, span=SPANS, cut=CUTS | st.just(1.0))
def test_damage_gives_pixels_or_a_data_error_and_nothing_else(
    form: str, changes: Changes, span: float, cut: float
) -> None:
    check_damaged(form, changes, span=span, cut=cut)


@QUIETLY
@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(form=FORMS, changes=CHANGES, span=SPANS, cut=CUTS | st.just(1.0))
def test_ten_thousand_damages_give_pixels_or_a_data_error_and_nothing_else(
    form: str, changes: Changes, span: float, cut: float
) -> None:
    check_damaged(form, changes, span=span, cut=cut)


def test_the_shared_case_of_deep_grey_survives(shared_data: Path) -> None:
    case = shared_data.parent / "cases" / "grey16.png"
    if not case.is_file():
        pytest.skip("../shared/cases is not there")
    assert len(grey_levels(case.read_bytes())) > 200
