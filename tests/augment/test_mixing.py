"""Mixup and cutmix against timm's, and independence of the batch's spread."""

import pytest
import torch
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target

from cmae_scale.augment.mixing import MixNumbers, cut_box, draw_mixes, mix_images, mix_labels, swap_pairs
from cmae_scale.config.transfer import FinetuneConfig

SIDE, CLASSES = 16, 5


def number(share: float, *, is_cut: bool, box: tuple[int, int, int, int] = (0, 0, 0, 0)) -> MixNumbers:
    return MixNumbers(torch.tensor([share, share]), torch.tensor([is_cut, is_cut]), torch.tensor([box, box]))


def test_mixup_of_a_pair_is_timms(rng: torch.Generator) -> None:
    images, labels = torch.randn(2, 3, SIDE, SIDE, generator=rng), torch.tensor([1, 4])
    mixed = mix_images(images, number(0.3, is_cut=False))
    torch.testing.assert_close(mixed, 0.3 * images + 0.7 * images.flip(0))
    ours = mix_labels(labels, number(0.3, is_cut=False), classes=CLASSES, smoothing=0.1)
    torch.testing.assert_close(ours, mixup_target(labels, CLASSES, lam=0.3, smoothing=0.1))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_cutmix_boxes_and_shares_are_timms(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for centre in ((0, 0), (8, 3), (15, 15)):
        places = iter(centre)
        monkeypatch.setattr("numpy.random.randint", lambda *_, **__: next(places))
        box, lam = cutmix_bbox_and_lam((3, SIDE, SIDE), share)
        ours = cut_box(share, centre=centre, img_px=SIDE)
        assert ours == tuple(int(edge) for edge in box)
        assert 1 - (ours[1] - ours[0]) * (ours[3] - ours[2]) / SIDE**2 == pytest.approx(lam)


def test_cutmix_takes_the_box_from_the_partner(rng: torch.Generator) -> None:
    images = torch.randn(2, 3, SIDE, SIDE, generator=rng)
    expected = images.clone()
    expected[:, :, 2:7, 4:16] = images.flip(0)[:, :, 2:7, 4:16]
    assert torch.equal(mix_images(images, number(0.7, is_cut=True, box=(2, 7, 4, 16))), expected)


def test_draws_do_not_depend_on_how_the_batch_is_cut(rng: torch.Generator) -> None:
    cfg = FinetuneConfig(mix_rows=6)
    images, labels = torch.randn(24, 3, SIDE, SIDE, generator=rng), torch.arange(24) % CLASSES
    numbers = draw_mixes(24, cfg=cfg, img_px=SIDE, rng=rng)
    parts = [slice(0, 2), slice(2, 10), slice(10, 24)]
    whole = mix_images(images, numbers)
    cut = [mix_images(images[p], numbers.rows(p.start, p.stop - p.start)) for p in parts]
    assert torch.equal(torch.cat(cut), whole)
    targets = mix_labels(labels, numbers, classes=CLASSES, smoothing=0.1)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(24))
    assert len(numbers.share.unique()) == 4  # one draw for six rows each


def test_lambda_and_the_choice_follow_the_settings(rng: torch.Generator) -> None:
    def draw(**settings: float) -> MixNumbers:
        return draw_mixes(8000, cfg=FinetuneConfig(mix_rows=2, **settings), img_px=64, rng=rng)  # type: ignore[arg-type]

    both = draw()
    assert both.is_cut.float().mean() == pytest.approx(0.5, abs=0.03)
    only = draw(cutmix=0.0)
    assert not only.is_cut.any()
    shares = only.share[::2]
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of beta(0.8, 0.8)
    assert draw(mixup=0.0).is_cut.all()


def test_partners_are_neighbours() -> None:
    assert swap_pairs(torch.arange(6.0)).tolist() == [1, 0, 3, 2, 5, 4]
