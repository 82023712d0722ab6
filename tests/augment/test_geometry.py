"""Windows against slicing and flipping one image at a time."""

import pytest
import torch
from torch import Tensor

from cmae_scale.augment.geometry import cut_windows


def cut_slowly(image: Tensor, *, top: int, left: int, flip: bool, side: int) -> Tensor:
    master = image.flip(-1) if flip else image
    return master[:, top : top + side, left : left + side]


@pytest.mark.parametrize(("master", "side"), [(9, 6), (32, 28), (8, 8), (5, 1)])
@pytest.mark.parametrize("crop", [0, 1])
def test_windows_equal_slices_of_flipped_images(
    rng: torch.Generator, master: int, side: int, crop: int
) -> None:
    images = torch.randint(0, 256, (5, 2, 3, master, master), generator=rng, dtype=torch.uint8)
    rows = torch.tensor([4, 0, 1, 1, 3, 2])
    top, left = torch.randint(0, master - side + 1, (2, len(rows)), generator=rng)
    flip = torch.tensor([True, False, True, False, True, True])
    got = cut_windows(images, rows, crop=crop, top=top, left=left, flip=flip, side=side)
    wanted = [
        cut_slowly(images[row, crop], top=int(y), left=int(x), flip=bool(mirror), side=side)
        for row, y, x, mirror in zip(rows, top, left, flip, strict=True)
    ]
    assert torch.equal(got, torch.stack(wanted))


def test_images_that_are_a_part_of_a_larger_tensor_work(rng: torch.Generator) -> None:
    images = torch.randint(0, 256, (6, 2, 3, 8, 8), generator=rng, dtype=torch.uint8)[1::2, :1]
    zero = torch.zeros(3, dtype=torch.long)
    got = cut_windows(images, torch.arange(3), crop=0, top=zero, left=zero + 2, flip=zero > 0, side=5)
    assert torch.equal(got, images[:, 0, :, :5, 2:7])
