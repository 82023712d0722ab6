"""Reading shards and decoding images, beside others who do it and beside what bounds them."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from cmae_scale.benchmarks.timing import Part, Scale, Way
from cmae_scale.config.cmae import ViewsConfig
from cmae_scale.data.crops import decode_crops
from cmae_scale.data.decode import CROP_DRAWS, Box, Size, decode_pixels, random_crop_box
from cmae_scale.data.index import ShardInfo
from cmae_scale.data.tar import read_samples

AREA, SHAPE = ViewsConfig().crop_scale, ViewsConfig().crop_ratio
GRAIN = 0.065  # of the range: what gives photographs' size


def prepare_tar(scale: Scale) -> Iterator[Part]:
    """Samples of a shard that lies in the page cache: strictly, by webdataset, by tarfile, merely read."""
    import webdataset

    with TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        _write_shard(path, samples=scale.samples, size=scale.sample_bytes)
        info = ShardInfo(path.name, scale.samples, path.stat().st_size, "0" * 64)

        def ours() -> int:
            samples = read_samples(path, first=0, count=scale.samples, expected=info)
            return sum(len(sample.image) for sample in samples)

        def stock() -> int:
            samples = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
            return sum(len(sample["jpg"]) for sample in samples)

        def standard() -> int:
            total = 0
            with tarfile.open(path, "r|") as archive:
                for member in archive:
                    file = archive.extractfile(member)
                    assert file is not None
                    total += len(file.read()) if member.name.endswith("jpg") else 0 * len(file.read())
            return total

        buffer = bytearray(1 << 20)

        def read() -> int:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
            return scale.samples * scale.sample_bytes

        ways: dict[str, Way] = {
            "ours": ours,
            "webdataset": stock,
            "tarfile": standard,
            "reading alone (the limit)": read,
        }
        totals = {way() for way in ways.values()}
        assert totals == {scale.samples * scale.sample_bytes}, totals
        yield Part(ways, scale.samples, "sample")


def prepare_decode(scale: Scale) -> Iterator[Part]:
    """From JPEGs to random resized crops of a master's side: ours, torchvision's decoder, Pillow."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    side = scale.img_px + 32
    images = draw_photographs(scale.images, side=2 * scale.img_px)
    rng = torch.Generator().manual_seed(0)
    draws = torch.rand(len(images), CROP_DRAWS, generator=rng).tolist()
    boxes = [
        random_crop_box(
            *Size(*Image.open(io.BytesIO(data)).size),
            scale=AREA,
            ratio=SHAPE,
            draws=numbers,
        )
        for data, numbers in zip(images, draws, strict=True)
    ]

    def as_tensor(crops: UInt8[np.ndarray, "1 side side 3"]) -> Tensor:
        return torch.from_numpy(crops[0]).permute(2, 0, 1)

    def ours() -> list[Tensor]:
        return [
            as_tensor(decode_crops(data, side=side, scale=AREA, ratio=SHAPE, max_mpx=100, draws=[numbers]))
            for data, numbers in zip(images, draws, strict=True)
        ]

    def crop(data: bytes, box: Box) -> Tensor:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        size = (box.bottom - box.top, box.right - box.left)
        resized: Tensor = v2.functional.resized_crop(
            pixels, box.top, box.left, *size, [side, side], v2.InterpolationMode.BICUBIC, antialias=True
        )
        return resized

    def by_torchvision() -> list[Tensor]:
        return [crop(data, box) for data, box in zip(images, boxes, strict=True)]

    def by_pillow() -> list[Tensor]:
        return [
            v2.functional.pil_to_tensor(
                Image.open(io.BytesIO(data)).convert("RGB").crop(box).resize((side, side), 3)
            )
            for data, box in zip(images, boxes, strict=True)
        ]

    ways: dict[str, Way] = {
        "ours": ours,
        "torchvision": by_torchvision,
        "Pillow": by_pillow,
        "decoding alone (the limit)": lambda: [decode_pixels(data, max_mpx=100) for data in images],
    }
    for others in (by_torchvision(), by_pillow()):
        for one, two in zip(ours(), others, strict=True):
            error = (one.float() - two.float()).abs().mean().item()
            assert error < 1, f"the same crop differs by {error:.2f} grey levels in the mean"
    yield Part(ways, len(images), "image")


def draw_photographs(count: int, *, side: int) -> list[bytes]:
    """JPEGs of slopes, texture and noise, half a byte for a pixel.

    Source: so have the first thousand sample images of ImageNet's classes, 110 kB for 0.2 megapixels.
    """
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        coarse, fine = (torch.rand(1, 3, side // cut, side // cut, generator=rng) for cut in (32, 4))
        parts = [
            torch.nn.functional.interpolate(part, size=(side, side), mode="bicubic")
            for part in (coarse, fine)
        ]
        grain = torch.randn(1, 3, side, side, generator=rng) * GRAIN
        pixels = (255 * (0.8 * parts[0] + 0.2 * parts[1] + grain)).clamp(0, 255).byte()[0].permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def _write_shard(path: Path, *, samples: int, size: int) -> None:
    image = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(samples):
            for ending, data in (("cls", b"7"), ("jpg", image)):
                entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
