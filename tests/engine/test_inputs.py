"""The random numbers of a step, drawn ahead."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.engine import inputs
from cmae_scale.engine.inputs import DrawsAhead, StepDraws, draw_step


def flatten(draws: StepDraws) -> list[torch.Tensor]:
    return [*vars(draws.numbers).values(), draws.noise, draws.target_noise]


@settings(max_examples=30)
@given(steps=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_numbers_are_those_of_the_step_whatever_came_before(steps: list[int]) -> None:
    cfg = CmaeConfig.model_validate_json('{"data": {"shards": "x"}, "model": {"encoder": "vit_small"}}')
    draws = DrawsAhead(cfg, total=8)
    for step in steps:  # in order, after going back, with steps left out
        expected = draw_step(cfg, total=8, step=step)
        assert all(map(torch.equal, flatten(draws.take(step)), flatten(expected)))


def test_the_next_step_is_drawn_in_a_thread_and_once(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, bool]] = []

    def draw(cfg: CmaeConfig, *, total: int, step: int) -> StepDraws:
        drawn.append((step, threading.current_thread() is threading.main_thread()))
        return draw_step(cfg, total=total, step=step)

    monkeypatch.setattr(inputs, "draw_step", draw)
    draws = DrawsAhead(tiny_run().cmae, total=8)
    for step in (3, 4, 5):
        draws.take(step)
    draws.take(6)
    assert sorted(drawn)[:4] == [(3, True), (4, False), (5, False), (6, False)]


def test_what_goes_wrong_in_the_thread_is_raised_where_it_is_due(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(cfg: CmaeConfig, *, total: int, step: int) -> StepDraws:
        if step == 2:
            raise RuntimeError("step 2")
        return draw_step(cfg, total=total, step=step)

    monkeypatch.setattr(inputs, "draw_step", draw)
    draws = DrawsAhead(tiny_run().cmae, total=8)
    draws.take(1)
    with pytest.raises(RuntimeError, match="step 2"):
        draws.take(2)
    draws.take(3)
