"""Which files are images: one table of formats, for listing files, naming members of tars and decoding."""

from collections.abc import Callable
from typing import NamedTuple


class ImageFormat(NamedTuple):
    """`name` is Pillow's. The first of `endings` (lower case, no dot) is the one that a stored image gets."""

    name: str
    endings: tuple[str, ...]
    is_begun_by: Callable[[bytes], bool]


def _is_avif(data: bytes) -> bool:
    """Source: ISO/IEC 14496-12, file type box; AV1 Image File Format, section 6."""
    brands = data[8:12] + data[16 : min(int.from_bytes(data[:4], "big"), 256)]
    return data[4:8] == b"ftyp" and any(brands[at : at + 4] in (b"avif", b"avis") for at in range(0, 256, 4))


def _is_ppm(data: bytes) -> bool:
    return data[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf") and data[2:3].isspace()


def _begins(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda data: data.startswith(starts)


FORMATS = (
    ImageFormat("JPEG", ("jpg", "jpeg", "jpe", "jfif", "jfi"), _begins(b"\xff\xd8\xff")),
    ImageFormat("PNG", ("png",), _begins(b"\x89PNG\r\n\x1a\n")),
    ImageFormat("WEBP", ("webp",), lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP"),
    ImageFormat("AVIF", ("avif",), _is_avif),
    ImageFormat("TIFF", ("tif", "tiff"), _begins(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ImageFormat("BMP", ("bmp", "dib"), lambda data: data[:2] == b"BM" and data[15:18] == b"\0\0\0"),
    ImageFormat("GIF", ("gif",), _begins(b"GIF87a", b"GIF89a")),
    ImageFormat(
        "JPEG2000",
        ("jp2", "j2k", "jpx", "jpf", "jpc", "j2c"),
        _begins(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    ),
    ImageFormat("PPM", ("ppm", "pgm", "pbm", "pnm", "pfm"), _is_ppm),
)
IMAGE_ENDINGS = frozenset(ending for each in FORMATS for ending in each.endings)
NAMES = ", ".join(each.name for each in FORMATS)

OTHER_CONTENT = (  # what people's files hold instead, and what to do about it
    (_begins(b"\x1f\x8b"), "compressed with gzip: unpack it (gunzip -c FILE > NEW)"),
    (_begins(b"\x28\xb5\x2f\xfd"), "compressed with zstd: unpack it (zstd -dc FILE > NEW)"),
    (_begins(b"BZh"), "compressed with bzip2: unpack it (bunzip2 -c FILE > NEW)"),
    (_begins(b"\xfd7zXZ\0"), "compressed with xz: unpack it (xz -dc FILE > NEW)"),
    (_begins(b"PK\x03\x04"), "a zip archive: unpack it first"),
    (_begins(b"7z\xbc\xaf\x27\x1c"), "a 7z archive: unpack it first"),
    (_begins(b"Rar!"), "a rar archive: unpack it first"),
    (_begins(b"PAR1"), "a Parquet file: pack it with --source huggingface"),
    (_begins(b"ARROW1"), "an Arrow file: pack the folder of its data set with --source huggingface"),
    (_begins(b"\x89HDF"), "an HDF5 file: write its images out as files"),
    (_begins(b"\x93NUMPY"), "a NumPy array: write its images out as files"),
    (_begins(b"version https://git-lfs"), "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (_begins(b"%PDF"), "a PDF document: export its pages as images"),
    (_begins(b"8BPS"), "a Photoshop document: export it as PNG"),
    (_begins(b"DDS "), "a DDS texture: convert it to PNG"),
    (lambda data: data[4:11] in (b"ftyphei", b"ftyphev", b"ftypmif"), "an HEIC image: convert it to JPEG"),
    (lambda data: data[128:132] == b"DICM", "a DICOM file: export its pixels as 16-bit PNG"),
    (lambda data: data[257:262] == b"ustar", "a tar archive: read it with --source webdataset"),
    (lambda data: b"<svg" in data[:512].lower(), "an SVG drawing: render it as PNG"),
    (lambda data: _is_page(data[:512].lower()), "a web page, as failed downloads leave: download it again"),
)


def _is_page(text: bytes) -> bool:
    return b"<html" in text or b"<!doctype html" in text


def find_format(data: bytes) -> ImageFormat | None:
    """The format that the content begins like, whatever the file was called."""
    return next((each for each in FORMATS if each.is_begun_by(data)), None)


def image_extension(data: bytes) -> str | None:
    """The ending that these bytes deserve, whatever the file was called; None if they are no image."""
    found = find_format(data)
    return None if found is None else found.endings[0]


def name_other(data: bytes) -> str | None:
    """What a file is that begins so, if it is of a known kind that is no image, and what to do about it."""
    return next((text for is_it, text in OTHER_CONTENT if is_it(data)), None)


def describe_content(data: bytes) -> str:
    """For messages: what bytes that are no image are instead."""
    if not data:
        return "an empty file"
    if data.count(0) == len(data):
        return "nothing but zeros, as a broken copy leaves: copy it again"
    return name_other(data) or f"no image that is read here ({NAMES}): it begins with {data[:8]!r}"
