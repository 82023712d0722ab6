"""Images to look at: spread over the data set, the same every time, around whatever cannot be decoded."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.config.cmae import ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.decode import decode_centre
from cmae_scale.data.index import ShardInfo
from cmae_scale.data.ordered import read_held_out
from cmae_scale.data.shard_set import Shard, ShardSet
from cmae_scale.data.storage import LOCAL

VIEWS = ViewsConfig(img_px=16, master_px=20, shift_px=4)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 2 * number, 3 * number)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Five shards of four samples, written by the stock writer; number 10 cannot be decoded."""
    import webdataset

    made = []
    for shard in range(5):
        path = tmp_path / f"{shard}.tar"
        with webdataset.TarWriter(str(path)) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                writer.write({"__key__": str(number), "png": b"broken" if number == 10 else picture(number)})
        info = ShardInfo(path.name, 4, path.stat().st_size, "0" * 64)
        made.append(Shard(str(tmp_path), path.name, info, LOCAL))
    return ShardSet(tuple(made), (), parts=(5,))


@pytest.mark.parametrize(
    ("count", "numbers"), [(1, [0]), (2, [0, 11]), (4, [0, 5, 11, 15]), (5, [0, 4, 8, 12, 16])]
)
def test_they_are_spread_evenly_and_step_over_bad_ones(
    shards: ShardSet, count: int, numbers: list[int]
) -> None:
    images, keys = read_held_out(shards, count=count, views=VIEWS, max_mpx=1.0)
    assert keys == tuple(f"{number // 4}.tar/{number}" for number in numbers)
    for image, number in zip(images, numbers, strict=True):
        np.testing.assert_array_equal(image.numpy(), decode_centre(picture(number), side=20, max_mpx=1.0))


def test_never_more_than_there_are(shards: ShardSet) -> None:
    with pytest.raises(DataError, match="none of samples 10 to 10"):
        read_held_out(shards, count=100, views=VIEWS, max_mpx=1.0)
