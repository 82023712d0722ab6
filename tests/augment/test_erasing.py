"""Random erasing: the share and shape of what is erased, and independence of the batch's spread."""

import pytest
import torch

from cmae_scale.augment.erasing import draw_boxes, erase_

SIDE = 32
AREA = (0.02, 1 / 3)


def test_areas_shapes_and_shares_are_timms(rng: torch.Generator) -> None:
    boxes = draw_boxes(20_000, p=0.25, area=AREA, img_px=SIDE, rng=rng)
    assert len(boxes.row) / 20_000 == pytest.approx(0.25, abs=0.01)
    top, left, height, width = boxes.box.unbind(1)
    assert int(top.min()) == int(left.min()) == 0
    assert int((top + height).max()) == int((left + width).max()) == SIDE
    assert int(height.max()) < SIDE
    assert int(width.max()) < SIDE
    shares = (height * width / SIDE**2).double()
    assert shares.min() > 0.01
    assert shares.max() < 0.37  # rounded to whole pixels
    ratio = (height / width).log()
    assert ratio.mean() == pytest.approx(0, abs=0.05)


def test_the_mean_share_is_that_of_timms_eraser() -> None:
    import random

    from timm.data.random_erasing import RandomErasing

    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(probability=1.0, mode="pixel", device="cpu")(torch.zeros(4000, 3, SIDE, SIDE))
    ours = torch.zeros(4000, 3, SIDE, SIDE)
    rng = torch.Generator().manual_seed(0)
    erase_(ours, draw_boxes(4000, p=1.0, area=AREA, img_px=SIDE, rng=rng), first_row=0)
    assert (ours != 0).float().mean() == pytest.approx(float((theirs != 0).float().mean()), rel=0.05)
    assert ours[ours != 0].std() == pytest.approx(1.0, abs=0.01)


def test_rows_are_erased_alike_however_the_batch_is_cut(rng: torch.Generator) -> None:
    images = torch.randn(12, 3, SIDE, SIDE, generator=rng)
    boxes = draw_boxes(12, p=0.7, area=AREA, img_px=SIDE, rng=rng)
    whole = images.clone()
    erase_(whole, boxes, first_row=0)
    parts = [images[:5].clone(), images[5:].clone()]
    erase_(parts[0], boxes, first_row=0)
    erase_(parts[1], boxes, first_row=5)
    assert torch.equal(torch.cat(parts), whole)
    touched = [row for row in range(12) if not torch.equal(whole[row], images[row])]
    assert touched == boxes.row.tolist()
