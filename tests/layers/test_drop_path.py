"""Stochastic depth with given numbers, beside timm's."""

import pytest
import timm
import torch
from timm.layers import DropPath

from cmae_scale.layers.drop_path import GivenDropPath, set_drop_paths_, take_over_drop_paths_


def test_rows_below_the_rate_are_dropped_and_others_scaled(rng: torch.Generator) -> None:
    tokens, uniform = torch.randn(6, 3, 4, generator=rng), torch.tensor([0.0, 0.1, 0.29, 0.3, 0.9, 0.5])
    path = GivenDropPath(0.3)
    path.uniform = uniform
    dropped = path(tokens)
    assert torch.equal(dropped[:3], torch.zeros(3, 3, 4))
    torch.testing.assert_close(dropped[3:], tokens[3:] / 0.7)
    assert torch.equal(path.eval()(tokens), tokens)


def test_its_mean_is_timms(rng: torch.Generator) -> None:
    tokens = torch.ones(20_000, 1, 1)
    path, theirs = GivenDropPath(0.2), DropPath(0.2)
    path.uniform = torch.rand(20_000, generator=rng)
    assert path(tokens).mean() == pytest.approx(1.0, abs=0.02)
    assert theirs(tokens).mean() == pytest.approx(1.0, abs=0.02)
    assert set(path(tokens).flatten().tolist()) == set(theirs(tokens).flatten().tolist())


def test_every_path_of_a_timm_model_is_taken_over_with_its_rate(rng: torch.Generator) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, drop_path_rate=0.3, num_classes=2)
    paths = take_over_drop_paths_(model)
    rates = [round(path.rate, 4) for path in paths]
    assert rates == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]  # the first block drops nothing
    assert not any(isinstance(module, DropPath) for module in model.modules())
    images = torch.randn(2, 3, 32, 32, generator=rng)
    set_drop_paths_(paths, torch.zeros(2, 6))
    dropped = model.train()(images)
    set_drop_paths_(paths, torch.full((2, 6), 0.9))
    assert not torch.equal(dropped, model(images))
