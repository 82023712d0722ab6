"""Master images: torchvision's resized crop bit for bit, Pillow's almost, whichever decoder is installed."""

import io
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from cmae_scale.core.errors import DataError
from cmae_scale.data import crops, decode
from cmae_scale.data.crops import RegionDecoders, decode_crops
from cmae_scale.data.decode import (
    CROP_DRAWS,
    Box,
    decode_image,
    decode_pixels,
    find_jpeg_decoder,
    random_crop_box,
)
from cmae_scale.data.plan import Purpose, draw_uniforms

ROOT = Path(__file__).resolve().parents[2]
SCALE, RATIO = (0.2, 1.0), (0.75, 4 / 3)


def draws(number: int) -> list[float]:
    return draw_uniforms(7, Purpose.CROP, slot=(0, number, 0), count=CROP_DRAWS).tolist()


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def read_photographs(folder: Path) -> list[bytes]:
    with tarfile.open(folder / "imagenette224_2500_800.tar") as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")][::300]
        return [file.read() for file in map(tar.extractfile, members) if file is not None]


@pytest.mark.parametrize(("width", "height"), [(500, 375), (90, 60), (20, 300), (64, 64), (1, 1)])
def test_a_master_is_torchvisions_resized_crop_bit_for_bit(width: int, height: int) -> None:
    image = picture(width, height)
    numbers = [draws(n) for n in range(6)]
    crops = decode_crops(encode(image), side=48, scale=SCALE, ratio=RATIO, max_mpx=50.0, draws=numbers)
    for crop, number in zip(crops, numbers, strict=True):
        box = random_crop_box(width, height, scale=SCALE, ratio=RATIO, draws=number)
        expected = tv.resized_crop(
            torch.from_numpy(np.array(image)).permute(2, 0, 1),  # torch rounds by memory layout
            box.top,
            box.left,
            box.bottom - box.top,
            box.right - box.left,
            [48, 48],
            InterpolationMode.BICUBIC,
            antialias=True,
        )
        np.testing.assert_array_equal(crop.transpose(2, 0, 1), expected)


def test_masters_of_photographs_are_pillows_but_for_rounding(shared_data: Path) -> None:
    errors = []
    for number, data in enumerate(read_photographs(shared_data)):
        crop = decode_crops(data, side=256, scale=SCALE, ratio=RATIO, max_mpx=50.0, draws=[draws(number)])
        image = decode_image(data, max_mpx=50.0)
        box = random_crop_box(image.width, image.height, scale=SCALE, ratio=RATIO, draws=draws(number))
        expected = image.crop(box).resize((256, 256), Image.Resampling.BICUBIC)
        errors.append(np.abs(crop[0].astype(int) - np.asarray(expected)))
    difference = np.stack(errors)
    assert difference.mean() < 0.1, "of 255"
    assert (difference > 1).mean() < 1e-3


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is not torch.ops.aten.lift_fresh.default  # of from_numpy, which keeps the lock
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("crops", [1, 2])
def test_torch_has_the_resize_alone_to_do(kind: str, crops: int) -> None:
    """It gives the interpreter lock away in every operation, and many threads wait for it then."""
    data, numbers = encode(picture(203, 155), kind), [draws(number) for number in range(crops)]
    with Operations() as operations:
        decode_crops(data, side=48, scale=(0.1, 1.0), ratio=RATIO, max_mpx=1.0, draws=numbers)
    assert operations.count == crops


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_no_image_is_worth_threads_of_its_own() -> None:
    """Where all cores decode, a team of threads that torch starts for a copy is in their way."""
    data = encode(picture(900, 700), "JPEG")
    usual = torch.get_num_threads()

    def crop_once(number: int) -> None:
        decode_crops(data, side=256, scale=(0.9, 1.0), ratio=(1.0, 1.0), max_mpx=1.0, draws=[draws(number)])

    with ThreadPoolExecutor(1) as pool:  # a thread that has no team yet
        torch.set_num_threads(7)
        before = pool.submit(count_threads).result()
        try:
            list(pool.map(crop_once, range(3)))
        finally:
            torch.set_num_threads(usual)
        assert count_threads() == before


OPTIONS = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_pixels_do_not_depend_on_the_decoder_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, mode: str, options: dict[str, object]
) -> None:
    if find_jpeg_decoder() is None:
        pytest.skip("simplejpeg is not installed")
    data = encode(picture(201, 155).convert(mode), "JPEG", **options)
    fast = decode_pixels(data, max_mpx=1.0).copy()
    monkeypatch.setattr(decode, "DECODE_JPEG", None)
    np.testing.assert_array_equal(fast, decode_pixels(data, max_mpx=1.0))


def test_real_photographs_too(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_jpeg_decoder() is None:
        pytest.skip("simplejpeg is not installed")
    photographs = read_photographs(shared_data)
    fast = [decode_pixels(data, max_mpx=50.0).copy() for data in photographs]
    monkeypatch.setattr(decode, "DECODE_JPEG", None)
    for data, pixels in zip(photographs, fast, strict=True):
        np.testing.assert_array_equal(pixels, decode_pixels(data, max_mpx=50.0))


@pytest.mark.parametrize("options", [*OPTIONS, {"restart_marker_blocks": 5}, {"icc_profile": b"colours"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_part_decoded_alone_is_that_part_of_the_whole(mode: str, options: dict[str, object]) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    data = encode(picture(203, 155).convert(mode), "JPEG", **options)
    whole = np.array(decode_image(data, max_mpx=1.0))
    corners = np.random.default_rng(1).integers(0, 150, (60, 4))
    for left, top, width, height in corners.tolist():
        box = Box(left, top, min(203, left + width + 1), min(155, top + height + 1))
        part = RegionDecoders().decode(data, box)
        assert part is not None
        np.testing.assert_array_equal(part, whole[box.top : box.bottom, box.left : box.right])


@pytest.mark.parametrize("scale", [(0.1, 0.4), (0.2, 1.0)])
def test_masters_do_not_depend_on_which_decoders_are_installed(
    monkeypatch: pytest.MonkeyPatch, scale: tuple[float, float]
) -> None:
    def crop_once(number: int) -> np.ndarray:
        data = encode(picture(203, 155), "JPEG")
        return decode_crops(data, side=48, scale=scale, ratio=RATIO, max_mpx=1.0, draws=[draws(number)])

    pytest.importorskip("nvidia.nvimgcodec")
    parts = []
    decode_part = crops.REGIONS.decode
    monkeypatch.setattr(crops.REGIONS, "decode", lambda *a: parts.append(decode_part(*a)) or parts[-1])
    fast = [crop_once(number) for number in range(20)]
    assert len(parts) > 5
    assert all(part is not None for part in parts)
    monkeypatch.setattr(crops.REGIONS, "decode", lambda *_: None)
    assert all(np.array_equal(crop, crop_once(number)) for number, crop in enumerate(fast))
    monkeypatch.setattr(decode, "DECODE_JPEG", None)
    assert all(np.array_equal(crop, crop_once(number)) for number, crop in enumerate(fast))


def test_a_file_that_was_cut_below_the_part_is_bad_too() -> None:
    data = encode(picture(203, 155), "JPEG")
    for share in (0.5, 0.9, 0.999):
        cut = data[: int(len(data) * share)]
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_crops(cut, side=48, scale=(0.05, 0.1), ratio=RATIO, max_mpx=1.0, draws=[draws(0)])


def test_a_region_decoder_that_does_not_start_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(203, 155), "JPEG")
    for name in ("nvidia", "nvidia.nvimgcodec"):
        monkeypatch.setitem(sys.modules, name, None)
    assert RegionDecoders().decode(data, Box(0, 0, 16, 16)) is None


def test_starting_region_decoders_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    code = (
        "from cmae_scale.data.crops import RegionDecoders, Box; import sys;"
        "print(RegionDecoders().decode(open(sys.argv[1], 'rb').read(), Box(0, 0, 9, 9)).shape)"
    )
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        file.write(encode(picture(64, 64), "JPEG"))
        file.flush()
        subprocess.run([sys.executable, "-c", code, file.name], check=True, cwd=ROOT)
    assert capfd.readouterr() == ("(9, 9, 3)\n", "")


def test_a_rotated_jpeg_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(60, 40), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_pixels(data, max_mpx=1.0), np.asarray(expected))


@pytest.mark.parametrize("has_fast", [True, False])
def test_which_images_are_bad_does_not_depend_on_the_decoder(
    monkeypatch: pytest.MonkeyPatch, has_fast: bool
) -> None:
    """Bytes behind the image and between its markers worry one decoder and not the other: Pillow decides."""
    if not has_fast:
        monkeypatch.setattr(decode, "DECODE_JPEG", None)
    data = encode(picture(200, 150), "JPEG")
    for odd in (data + b"trailing", data[:2] + b"\xff\xfe\x00\x04hi" + data[2:]):
        assert decode_pixels(odd, max_mpx=1.0).shape == (150, 200, 3)
    for cut in (len(data) // 4, len(data) // 2, len(data) - 40):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode_pixels(data[:cut], max_mpx=1.0)


def test_a_decoder_that_announces_more_than_allowed_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: bytes, **__: object) -> None:
        raise AssertionError("decoded before the header was checked")

    monkeypatch.setattr(decode, "DECODE_JPEG", refuse)
    with pytest.raises(DataError, match="above the limit of"):
        decode_pixels(encode(picture(200, 150), "JPEG"), max_mpx=0.01)
