"""Small images, folders of them, and shards made of those."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import RawSample, read_samples
from data_prep.make_shards import main


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return root


def make(source: str, root: Path, out: Path, *options: str) -> int:
    argv = ["--source", source, "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, *options])


def read_all(folder: Path) -> list[RawSample]:
    index = read_index(folder)
    return [
        sample
        for number, shard in enumerate(index.shards)
        for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
    ]
