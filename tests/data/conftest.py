"""Folders of small shards, as make_shards leaves them."""

import hashlib
import io
import itertools
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from PIL import Image

from cmae_scale.data.index import ShardIndex, ShardInfo, write_index

CLASSES = tuple(str(digit) for digit in range(10))


class WriteFolder(Protocol):
    """Writes shards of so many samples each, and their index; images numbered in `bad` cannot be decoded."""

    def __call__(
        self,
        folder: Path | str,
        sizes: Sequence[int],
        *,
        side: int = 24,
        bad: Collection[int] = (),
        classes: tuple[str, ...] = CLASSES,
    ) -> Path: ...


@pytest.fixture(scope="session")
def write_folder() -> WriteFolder:
    pictures: dict[tuple[int, int], bytes] = {}

    def picture(number: int, side: int) -> bytes:
        if (side, number) not in pictures:
            rng = np.random.default_rng(number)
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
            pictures[side, number] = file.getvalue()
        return pictures[side, number]

    def write(
        folder: Path | str,
        sizes: Sequence[int],
        *,
        side: int = 24,
        bad: Collection[int] = (),
        classes: tuple[str, ...] = CLASSES,
    ) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True)
        numbers = itertools.count()
        infos = []
        for shard, size in enumerate(sizes):
            members = []
            for number in itertools.islice(numbers, size):
                image = b"\x89PNG\r\n\x1a\n broken" if number in bad else picture(number, side)
                members += [(f"{number:09d}.png", image), (f"{number:09d}.cls", str(number % 10).encode())]
            content = tar_bytes(members)
            path = folder / f"shard-{shard:05d}.tar"
            path.write_bytes(content)
            infos.append(ShardInfo(path.name, size, len(content), hashlib.sha256(content).hexdigest()))
        write_index(ShardIndex(folder, tuple(infos), classes, sum(sizes), source="made up", options={}))
        return folder

    return write


@pytest.fixture
def make_folder(write_folder: WriteFolder, tmp_path: Path) -> WriteFolder:
    """The same, below the test's own folder."""

    def make(name: Path | str, sizes: Sequence[int], **options: Any) -> Path:
        return write_folder(tmp_path / name, sizes, **options)

    return make


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()
