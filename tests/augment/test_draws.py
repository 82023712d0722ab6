"""The random numbers of the views: ranges, chances, and that they depend on nothing but the generator."""

from dataclasses import fields

import pytest
import torch

from cmae_scale.augment import ViewNumbers, draw_views
from cmae_scale.config.cmae import ColorConfig, ViewsConfig

MANY = 20_000


def draw(total: int = MANY, *, seed: int = 0, views: ViewsConfig | None = None) -> ViewNumbers:
    return draw_views(total, views=views or ViewsConfig(), rng=torch.Generator().manual_seed(seed))


def assert_same(left: ViewNumbers, right: ViewNumbers) -> None:
    for field in fields(ViewNumbers):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


def test_the_same_seed_draws_the_same_numbers_and_another_seed_draws_others() -> None:
    assert_same(draw(100, seed=3), draw(100, seed=3))
    assert not torch.equal(draw(100, seed=3).brightness, draw(100, seed=4).brightness)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_the_parts_of_any_world_join_to_the_numbers_of_one_process(ranks: int) -> None:
    whole, local = draw(24), 24 // ranks
    parts = [whole.rows(rank * local, local) for rank in range(ranks)]
    joined = {
        field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(ViewNumbers)
    }
    assert_same(ViewNumbers(**joined), whole)


def test_rows_outside_of_the_batch_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"rows 90\+20 of 100"):
        draw(100).rows(90, 20)


@pytest.mark.parametrize("shift_px", [1, 2, 7, 32, 33])
def test_shifts_take_every_whole_number_from_0_to_shift_px_minus_1_alike_on_both_axes(shift_px: int) -> None:
    numbers = draw(views=ViewsConfig(shift_px=shift_px))
    for shift in (numbers.shift_x, numbers.shift_y):
        counts = torch.bincount(shift, minlength=shift_px)
        assert len(counts) == shift_px
        expected = MANY / shift_px
        assert (counts - expected).abs().max() < 5 * expected**0.5 + 1e-9
    if shift_px == 32:
        both = torch.stack([numbers.shift_x, numbers.shift_y]).double()
        assert torch.corrcoef(both)[0, 1].abs() < 0.05, "the axes must move on their own"


@pytest.mark.parametrize("views", [ViewsConfig(shift_px=0), ViewsConfig(target_crop="random")])
def test_without_a_pixel_shift_all_shifts_are_zero(views: ViewsConfig) -> None:
    numbers = draw(views=views)
    assert not numbers.shift_x.any()
    assert not numbers.shift_y.any()


@pytest.mark.parametrize("name", ["flip", "jitter", "gray", "blur"])
def test_events_happen_as_often_as_the_settings_say(name: str) -> None:
    chance = {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.5}[name]
    share = getattr(draw(), name).double().mean().item()
    assert abs(share - chance) < 5 * (chance * (1 - chance) / MANY) ** 0.5


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_chances_of_zero_and_one_are_certain(chance: float) -> None:
    ops = ColorConfig(jitter_p=chance, gray_p=chance, blur_p=chance)
    numbers = draw(views=ViewsConfig(flip_p=chance, color_ops=ops))
    for event in (numbers.flip, numbers.jitter, numbers.gray, numbers.blur):
        assert bool((event == bool(chance)).all())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
        ("sigma", 0.1, 2.0),
    ],
)
def test_factors_are_uniform_over_their_range(name: str, low: float, high: float) -> None:
    value = getattr(draw(), name)
    assert value.dtype == torch.float32
    rounding = 1e-6
    assert low - rounding <= value.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < value.max() <= high + rounding
    quarters = torch.quantile(value, torch.tensor([0.25, 0.5, 0.75]))
    expected = low + (high - low) * torch.tensor([0.25, 0.5, 0.75])
    torch.testing.assert_close(quarters, expected, atol=0.02 * (high - low), rtol=0)


def test_every_order_of_the_four_operations_is_equally_likely() -> None:
    order = draw().order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(MANY, 4))
    counts = torch.bincount((order * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0]
    assert len(counts) == 24
    assert (counts - MANY / 24).abs().max() < 5 * (MANY / 24) ** 0.5


def test_switching_colour_off_leaves_geometry_as_it_was() -> None:
    with_color, without = draw(100), draw(100, views=ViewsConfig(color=False))
    for name in ("flip", "shift_x", "shift_y"):
        assert torch.equal(getattr(with_color, name), getattr(without, name))
    assert not (without.jitter | without.gray | without.blur).any()
