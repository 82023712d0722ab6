"""Decoding and cropping against torchvision, and everything awkward that image files do."""

import io
import math
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import (
    CROP_DRAWS,
    Box,
    Size,
    decode_centre,
    decode_image,
    is_plain_jpeg,
    open_image,
    random_crop_box,
    read_plain_size,
)
from cmae_scale.data.plan import Purpose, draw_uniforms

SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)


def draws(number: int) -> list[float]:
    return draw_uniforms(7, Purpose.CROP, slot=(0, number, 0), count=CROP_DRAWS).tolist()


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def torchvision_box(width: int, height: int, numbers: list[float], monkeypatch: pytest.MonkeyPatch) -> Box:
    """RandomResizedCrop.get_params, fed with our numbers where it asks torch for random ones."""
    tries = iter(numbers[:-2])
    locations = iter(numbers[-2:])

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return self.fill_(float(low) + (float(high) - float(low)) * next(tries))

    def randint(low: int, high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.full(size, low + int(next(locations) * (high - low)))

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform)
    monkeypatch.setattr(torch, "randint", randint)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        image = Image.new("L", (width, height))
        top, left, tall, wide = RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    finally:
        torch.set_default_dtype(default)
        monkeypatch.undo()
    return Box(left, top, left + wide, top + tall)


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (32, 32), (1, 1), (2, 1), (640, 218), (40, 2000), (3000, 9)]
)
def test_crop_boxes_are_those_of_torchvision_for_the_same_numbers(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        box = random_crop_box(width, height, scale=SCALE, ratio=RATIO, draws=draws(number))
        assert box == torchvision_box(width, height, draws(number), monkeypatch)


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    number=st.integers(0, 10**9),
    low=st.floats(1e-4, 1),
)
def test_crop_boxes_lie_inside_the_image_and_are_not_empty(
    width: int, height: int, number: int, low: float
) -> None:
    box = random_crop_box(width, height, scale=(low, 1.0), ratio=RATIO, draws=draws(number))
    assert 0 <= box.left < box.right <= width
    assert 0 <= box.top < box.bottom <= height


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_outermost_numbers_stay_inside(number: float) -> None:
    box = random_crop_box(37, 53, scale=SCALE, ratio=RATIO, draws=[number] * CROP_DRAWS)
    assert 0 <= box.left < box.right <= 37
    assert 0 <= box.top < box.bottom <= 53


def test_areas_and_shapes_are_spread_as_asked() -> None:
    boxes = [random_crop_box(2000, 2000, scale=(0.2, 0.5), ratio=RATIO, draws=draws(n)) for n in range(4000)]
    areas = sorted((b.right - b.left) * (b.bottom - b.top) / 4e6 for b in boxes)
    shapes = sorted(math.log((b.right - b.left) / (b.bottom - b.top)) for b in boxes)
    assert areas[0] > 0.199
    assert areas[-1] < 0.501
    assert abs(areas[2000] - 0.35) < 0.01
    assert abs(shapes[2000]) < 0.02
    assert abs(shapes[1000] + math.log(4 / 3) / 2) < 0.02


@pytest.mark.parametrize(
    ("width", "height"), [(500, 375), (375, 500), (64, 64), (33, 47), (47, 33), (21, 600)]
)
@pytest.mark.parametrize("side", [32, 45])
def test_the_centre_is_torchvisions_resize_and_center_crop_bit_for_bit(
    width: int, height: int, side: int
) -> None:
    image = picture(width, height)
    expected = tv.center_crop(tv.resize(image, side, InterpolationMode.BICUBIC), [side, side])
    centre = decode_centre(encode(image), side=side, max_mpx=50.0)
    np.testing.assert_array_equal(centre, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(10))
def test_exif_rotation_is_applied_and_nonsense_ignored(orientation: int) -> None:
    image = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data, max_mpx=1.0).size == upright.size
    np.testing.assert_array_equal(np.asarray(decode_image(data, max_mpx=1.0)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_does_not_cost_the_image() -> None:
    image = picture(60, 40)
    data = encode(image, "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff garbage")
    assert decode_image(data, max_mpx=1.0).size == (60, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    else:
        image = picture(64, 64).convert("RGB" if mode == "LA" else mode)
        image = image.convert(mode)
    decoded = decode_image(encode(image), max_mpx=1.0)
    assert decoded.mode == "RGB"
    if mode == "I;16":
        assert decoded.getextrema() == ((0, 255),) * 3, "16 bits are scaled to 8, not clipped"
    if mode in ("L", "RGB"):
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("form", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")]
)
def test_other_formats_and_modes_become_rgb(form: str, mode: str) -> None:
    decoded = decode_image(encode(picture(40, 30).convert(mode), form), max_mpx=1.0)
    assert (decoded.mode, decoded.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_of_an_animation_the_first_picture_is_taken(form: str) -> None:
    first, *others = [picture(40, 30, seed=seed) for seed in range(3)]
    data = encode(first, form, save_all=True, append_images=others, lossless=True)
    np.testing.assert_array_equal(np.asarray(decode_image(data, max_mpx=1.0)), np.asarray(first))


def test_a_palette_with_transparency_raises_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    image = picture(40, 30).convert("P")
    assert decode_image(encode(image, transparency=bytes(range(256))), max_mpx=1.0).mode == "RGB"
    assert not recwarn.list


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_header_that_announces_too_many_pixels_is_refused_before_decoding() -> None:
    with pytest.raises(DataError, match="8000x7000 is 56 megapixels, above the limit of 50"):
        open_image(png_header(8000, 7000), max_mpx=50.0)
    with pytest.raises(DataError):
        open_image(png_header(100_000, 100_000), max_mpx=50.0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_cut_image_is_a_data_error_and_never_a_half_picture(form: str) -> None:
    data = encode(picture(200, 150), form)
    for cut in [0, 1, 3, 12, 30, len(data) // 4, len(data) // 2, len(data) * 3 // 4]:
        with pytest.raises(DataError):
            decode_image(data[:cut], max_mpx=1.0)


def test_the_ten_oddities_all_load_upright_and_in_rgb(shared_data: Path) -> None:
    sizes = {}
    with tarfile.open(shared_data / "oddities.tar") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if member.name.endswith(".jpg") and file is not None:
                image = decode_image(file.read(), max_mpx=50.0)
                assert image.mode == "RGB"
                sizes[member.name] = image.size
    assert sizes == {
        "big_3.8Mpx.jpg": (2400, 1600),
        "exif6_3024x3024.jpg": (3024, 3024),
        "exif_orientation_0.jpg": (500, 333),
        "exif_orientation_6.jpg": (294, 392),  # stored lying, shown standing
        "grey_L.jpg": (500, 330),
        "png_named.jpg": (500, 374),
        "progressive.jpg": (3293, 4392),
        "short_150x72.jpg": (150, 72),
        "tiny_75x56.jpg": (75, 56),
        "wide_640x218.jpg": (640, 218),
    }


HEADERS = [
    {},
    {"mode": "L"},
    {"progressive": True},
    {"icc_profile": b"colours" * 9},
    {"comment": b"a comment"},
    {"restart_marker_blocks": 3},
    {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"},
    {"mode": "CMYK"},
]


def encode_jpeg(*, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    picture(56, 40).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("options", "is_plain"), [*zip(HEADERS, [True] * 6 + [False] * 2, strict=True)])
def test_the_size_of_a_plain_jpeg_is_read_without_pillow(options: dict[str, object], is_plain: bool) -> None:
    size = read_plain_size(encode_jpeg(**options))
    assert size == (Size(56, 40) if is_plain else None)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_images_have_no_plain_size(form: str) -> None:
    file = io.BytesIO()
    picture(56, 40).save(file, form)
    assert read_plain_size(file.getvalue()) is None
    assert read_plain_size(b"") is None
    assert read_plain_size(b"\xff\xd8\xff\xe0") is None


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(HEADERS),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_a_damaged_header_has_a_plain_size_only_if_pillow_agrees(
    options: dict[str, object], changes: list[tuple[float, int]]
) -> None:
    data = bytearray(encode_jpeg(**options))
    header = data.index(b"\xff\xda") + 4
    for location, value in changes:
        data[3 + int(location * (header - 3))] = value
    size = read_plain_size(bytes(data))
    if size is None or not size.fits(89.0):  # larger ones are refused, or Pillow warns
        return
    image = open_image(bytes(data), max_mpx=89.0)
    assert image.size == size
    assert is_plain_jpeg(image)


@pytest.mark.parametrize("options", HEADERS[:6])
def test_a_header_cut_anywhere_has_no_plain_size_unless_pillow_opens_it(options: dict[str, object]) -> None:
    data = encode_jpeg(**options)
    for length in range(data.index(b"\xff\xda") + 20):
        try:
            expected = open_image(data[:length], max_mpx=50.0).size
        except DataError:
            expected = None
        assert read_plain_size(data[:length]) in (None, expected)


def test_quantization_tables_that_are_cut_leave_no_plain_size() -> None:
    data = encode_jpeg()
    at = data.index(b"\xff\xdb")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    cut = (
        data[: at + 2]
        + (length - 1).to_bytes(2, "big")
        + data[at + 4 : at + 1 + length]
        + data[at + 2 + length :]
    )
    assert read_plain_size(data) is not None
    assert read_plain_size(cut) is None
    with pytest.raises(DataError, match="damaged header"):
        open_image(cut, max_mpx=50.0)
