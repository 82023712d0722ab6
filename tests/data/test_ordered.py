"""The stream for evaluation: every sample once, in order, over any ranks and workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmae_scale.config.cmae import DataConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.data.decoding import BadSamples, CentreCrops
from cmae_scale.data.ordered import open_ordered, share_pieces
from cmae_scale.data.shard_set import open_shards

CROP = CropConfig(img_px=16, centre=0.8)


def read(folder: Path, *, bad: BadSamples | None = None, workers: int = 2, **how: Any) -> list[Any]:
    data = DataConfig(shards=str(folder), workers=workers)
    stream = open_ordered(
        open_shards(str(folder), data=data),
        decoding=CentreCrops(CROP, 50.0),
        data=data,
        bad=bad or BadSamples(1.0),
        **{"batch": 4, **how},
    )
    with stream:
        return list(stream)


def keys(batches: list[Any]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_sample_comes_once_and_in_order(
    write_folder: Callable[..., Path], tmp_path: Path, ranks: int, batch: int
) -> None:
    folder = write_folder(tmp_path / "shards", [5, 1, 7])
    alone = read(folder, workers=1)
    shares = [read(folder, rank=rank, ranks=ranks, batch=batch) for rank in range(ranks)]
    assert [key for share in shares for key in keys(share)] == keys(alone)
    assert len(set(keys(alone))) == 13
    pixels = torch.cat([part.images for share in shares for part in share])
    assert torch.equal(pixels, torch.cat([part.images for part in alone]))


def test_a_share_is_never_more_than_one_sample_larger_than_another() -> None:
    sizes = [sum(piece.samples for piece in share_pieces([5, 1, 7], rank=r, ranks=4)) for r in range(4)]
    assert sum(sizes) == 13
    assert max(sizes) - min(sizes) <= 1


def test_a_fraction_is_the_first_part_of_every_shard(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "shards", [10, 4])
    some, every = keys(read(folder, fraction=0.3)), keys(read(folder))
    assert some == every[:3] + every[10:12]


def test_a_bad_image_keeps_its_place_without_a_label(
    write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "shards", [6], bad=[2])
    bad = BadSamples(1.0)
    batches = read(folder, bad=bad)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert labels[2] == -1
    assert labels.count(-1) == 1
    assert keys(batches)[2] in bad.reasons


def test_the_centre_is_torchvisions(write_folder: Callable[..., Path], tmp_path: Path) -> None:
    import io

    from PIL import Image
    from torchvision.transforms import v2

    rng = np.random.default_rng(0)
    for width, height in ((37, 50), (64, 31), (20, 20)):
        file = io.BytesIO()
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(file, "PNG")
        ours = np.empty((1, 16, 16, 3), np.uint8)
        CentreCrops(CROP, 50.0).decode(file.getvalue(), None, out=ours)  # type: ignore[arg-type]
        theirs = v2.Compose(
            [v2.Resize(20, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16), v2.PILToTensor()]
        )(picture)
        np.testing.assert_array_equal(ours[0].transpose(2, 0, 1), theirs)
