import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.layers.tokens import TokenMask, mask_from_noise, scatter_tokens, take_tokens


def visible_patches(noise: list[float], *, grid: int, cell: int, ratio: float) -> list[int]:
    """Patches of the cells with the lowest noise, one cell and one patch at a time."""
    side = grid // cell
    ranked = sorted(range(len(noise)), key=lambda number: noise[number])
    visible = []
    for number in ranked[: int(len(noise) * (1 - ratio))]:
        row, column = divmod(number, side)
        for down in range(cell):
            for right in range(cell):
                visible.append((row * cell + down) * grid + column * cell + right)
    return sorted(visible)


@pytest.mark.parametrize(
    ("grid", "cell", "ratio"), [(14, 2, 0.65), (14, 1, 0.75), (16, 2, 0.65), (6, 3, 0.5)]
)
def test_the_cells_with_the_lowest_noise_are_kept(
    rng: torch.Generator, grid: int, cell: int, ratio: float
) -> None:
    noise = torch.rand(5, (grid // cell) ** 2, generator=rng)
    mask = mask_from_noise(noise, grid=grid, cell=cell, ratio=ratio)
    for kept, hidden, row in zip(mask.kept.tolist(), mask.hidden.tolist(), noise.tolist(), strict=True):
        assert kept == visible_patches(row, grid=grid, cell=cell, ratio=ratio)
        assert hidden == sorted(set(range(grid * grid)) - set(kept))


@pytest.mark.parametrize(
    ("grid", "cell", "ratio", "kept"),
    [(14, 2, 0.65, 68), (14, 1, 0.75, 49), (16, 2, 0.65, 88)],
    ids=["official CMAE", "MAE", "official masking at ViT-H/14"],
)
def test_as_many_patches_stay_as_published(grid: int, cell: int, ratio: float, kept: int) -> None:
    mask = mask_from_noise(torch.rand(2, (grid // cell) ** 2), grid=grid, cell=cell, ratio=ratio)
    assert mask.kept.shape == (2, kept)
    assert mask.hidden.shape == (2, grid * grid - kept)


def test_a_ratio_of_zero_keeps_everything() -> None:
    mask = mask_from_noise(torch.rand(3, 4), grid=4, cell=2, ratio=0.0)
    assert mask.kept.tolist() == [list(range(16))] * 3
    assert mask.hidden.shape == (3, 0)


def test_equal_noise_keeps_the_first_cells() -> None:
    assert mask_from_noise(torch.zeros(1, 9), grid=3, cell=1, ratio=0.5).kept.tolist() == [[0, 1, 2, 3]]


def test_the_mask_of_an_image_does_not_depend_on_its_neighbours(rng: torch.Generator) -> None:
    noise = torch.rand(6, 49, generator=rng)
    together = mask_from_noise(noise, grid=14, cell=2, ratio=0.65)
    alone = mask_from_noise(noise[4:5], grid=14, cell=2, ratio=0.65)
    assert torch.equal(together.kept[4:5], alone.kept)


@given(
    side=st.integers(1, 6),
    cell=st.integers(1, 4),
    ratio=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_kept_and_hidden_are_every_patch_once(side: int, cell: int, ratio: float, seed: int) -> None:
    noise = torch.rand(2, side * side, generator=torch.Generator().manual_seed(seed))
    mask = mask_from_noise(noise, grid=side * cell, cell=cell, ratio=ratio)
    everything = torch.cat([mask.kept, mask.hidden], dim=1).sort(dim=1).values
    assert everything.tolist() == [list(range((side * cell) ** 2))] * 2
    for part in mask:
        assert torch.equal(part, part.sort(dim=1).values)


def test_taking_and_scattering_put_every_token_in_its_place(rng: torch.Generator) -> None:
    tokens = torch.randn(3, 16, 5, generator=rng)
    fill = torch.randn(1, 1, 5, generator=rng)
    mask = mask_from_noise(torch.rand(3, 16, generator=rng), grid=4, cell=1, ratio=0.6)
    everywhere = scatter_tokens(take_tokens(tokens, mask.kept), mask, fill=fill)
    for image in range(3):
        for patch in range(16):
            expected = tokens[image, patch] if patch in mask.kept[image] else fill[0, 0]
            assert torch.equal(everywhere[image, patch], expected)


def test_gradients_go_to_the_token_that_was_used() -> None:
    mask = TokenMask(kept=torch.tensor([[0, 3]]), hidden=torch.tensor([[1, 2]]))
    tokens = torch.zeros(1, 2, 1, requires_grad=True)
    fill = torch.zeros(1, 1, 1, requires_grad=True)
    everywhere = scatter_tokens(tokens, mask, fill=fill)
    (everywhere * torch.tensor([1.0, 10.0, 100.0, 1000.0])[None, :, None]).sum().backward()
    assert tokens.grad is not None
    assert fill.grad is not None
    assert tokens.grad.flatten().tolist() == [1.0, 1000.0]
    assert fill.grad.item() == 110.0


def test_low_precision_tokens_take_the_dtype_of_the_fill() -> None:
    mask = TokenMask(kept=torch.tensor([[1]]), hidden=torch.tensor([[0]]))
    everywhere = scatter_tokens(torch.ones(1, 1, 2, dtype=torch.bfloat16), mask, fill=torch.zeros(1, 1, 2))
    assert everywhere.dtype == torch.float32
