"""The update of a plain torch optimizer: a plain loop's to the bit, and no GPU waits for it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmae_scale.engine.zero.patches import PlainUpdate

STEPS = 12
LIMIT = 0.5


class Engine:
    """What the update asks of DeepSpeed's, which takes a step in this order."""

    def __init__(self, *, limit: float, fused: bool) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))
        self.module[0].bias.requires_grad = False
        self.limit = limit
        trained = [p for p in self.module.parameters() if p.requires_grad]
        groups = [{"params": trained[:1], "weight_decay": 0.05}, {"params": trained[1:], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused)

    def gradient_clipping(self) -> float:
        return self.limit

    def clip_fp32_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), self.limit)

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self) -> None:
        if self.limit:
            self.clip_fp32_gradients()
        self.optimizer.step()
        self.zero_grad()

    def learn(self, step: int, *, spoil: float | None) -> None:
        images = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        self.module(images).square().mean().backward()
        if spoil is not None:
            self.module[1].weight.grad[1, 3] = spoil

    def describe(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"]
        return [
            *self.module.state_dict().values(),
            *(v for values in state.values() for v in values.values()),
        ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("limit", [0.0, LIMIT])
@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad", [(), (0,), (3, 4), (11,), range(STEPS)])
def test_steps_that_are_not_finite_are_as_if_they_had_not_been(
    fused: bool, limit: float, spoil: float, bad: tuple[int, ...]
) -> None:
    ours, plain = (Engine(limit=limit, fused=fused) for _ in range(2))
    PlainUpdate(ours)
    for step in range(STEPS):
        ours.learn(step, spoil=spoil if step in bad else None)
        ours.step()
        assert ours.optimizer.overflow == (step in bad)
        assert all(parameter.grad is None for parameter in ours.module.parameters())
        if step not in bad:
            plain.learn(step, spoil=None)
            plain.step()
    if len(bad) < STEPS:
        for got, expected in zip(ours.describe(), plain.describe(), strict=True):
            assert torch.equal(got, expected)
    else:  # a fused optimizer has its moments by then, all zero
        assert all(
            torch.equal(got, old) for got, old in zip(ours.describe()[:4], plain.describe(), strict=True)
        )
        assert not any(moment.any() for moment in ours.describe()[4:])


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_update_is_on_its_way_before_the_host_waits(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    engine, order = Engine(limit=LIMIT, fused=fused), []
    take, read = engine.optimizer.step, Tensor.__float__
    engine.optimizer.step = lambda: order.append("update") or take()  # type: ignore[method-assign,func-returns-value]
    PlainUpdate(engine)
    engine.learn(0, spoil=None)
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: order.append("host waits") or read(tensor))
    engine.step()
    assert order == (["update", "host waits"] if fused else ["host waits", "update"])


@pytest.mark.dist
@pytest.mark.parametrize("limit", [0.0, LIMIT])
def test_no_step_walks_through_the_modules(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], limit: float
) -> None:
    def count() -> int:
        from cmae_scale.benchmarks.noise import NoiseTraining, make_noise
        from cmae_scale.engine.process.group import start_processes

        run = tiny_run(ranks=1, stage=0, gradient_clipping=limit)
        training = NoiseTraining(run, context=start_processes())
        noise = make_noise(run, training.batch, step=0, pin=False)
        training.take(0, noise)
        walks, members = 0, nn.Module.named_parameters

        def note(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal walks
            walks += 1
            return members(module, *args, **kwargs)

        nn.Module.named_parameters = note  # type: ignore[method-assign]
        training.take(1, noise)
        return walks

    assert on_ranks(count, ranks=1) == [0]
