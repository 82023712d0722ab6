"""Sizes of plain PNGs, read without Pillow, beside those that Pillow reads."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import DEEP_MODES, open_image
from data_prep.encoding import QUIET_MPX, _find_notes, _read_header
from data_prep.png_header import read_plain_png_size

MODES = ("1", "L", "LA", "RGB", "RGBA")


def encode_png(mode: str, **options: object) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (21, 34, 4), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def insert(png: bytes, chunks: bytes) -> bytes:
    return png[:33] + chunks + png[33:]


DENSITY = insert(encode_png("RGB"), chunk(b"gAMA", b"\0\0\xb1\x8f") + chunk(b"pHYs", bytes(9)))
PLAIN = [*map(encode_png, MODES), DENSITY]


@pytest.mark.parametrize("data", PLAIN)
def test_the_size_of_a_plain_png_is_read_without_pillow(data: bytes) -> None:
    assert read_plain_png_size(data) == (34, 21) == open_image(data, max_mpx=50.0).size


def test_what_only_pillow_should_open_has_no_plain_size() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "anything")
    frames = [Image.new("RGB", (34, 21), color) for color in ("red", "blue")]
    animated, deep = io.BytesIO(), io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    Image.fromarray(np.zeros((21, 34), dtype=np.uint16)).save(deep, "PNG")
    others = [
        encode_png("P"),
        encode_png("RGB", pnginfo=text),
        animated.getvalue(),
        deep.getvalue(),
        insert(encode_png("L"), chunk(b"gAMA", b"\0")),
        b"",
        b"\xff\xd8\xff\xe0",
    ]
    for data in others:
        assert read_plain_png_size(data) is None


@pytest.mark.parametrize("data", PLAIN)
def test_a_png_cut_anywhere_has_no_plain_size_unless_pillow_opens_it(data: bytes) -> None:
    for length in range(data.index(b"IDAT") + 8):
        expected = None
        with contextlib.suppress(DataError):
            expected = open_image(data[:length], max_mpx=50.0).size
        assert read_plain_png_size(data[:length]) == expected


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(PLAIN),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_changed_header_has_a_plain_size_only_if_pillow_agrees(
    png: bytes, changes: list[tuple[float, int]], is_signed_again: bool
) -> None:
    data = bytearray(png)
    for location, value in changes:
        data[int(location * data.index(b"IDAT"))] = value
    if is_signed_again:  # or the checksum would find all changes
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    size = read_plain_png_size(bytes(data))
    if size is None or not size.fits(QUIET_MPX):
        return
    image = open_image(bytes(data), max_mpx=QUIET_MPX)
    assert image.size == size
    assert image.mode not in DEEP_MODES
    assert not list(_find_notes(image, bytes(data)))


@pytest.mark.parametrize("data", PLAIN)
def test_a_header_says_the_same_with_and_without_pillow(data: bytes) -> None:
    assert _read_header(data) == _read_header(insert(data, chunk(b"tEXt", b"Comment\0no longer plain")))
