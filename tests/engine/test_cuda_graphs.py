"""Networks recorded once and replayed: on the CPU with a recorder that keeps to the rules of CUDA graphs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.engine import cuda_graphs, setup
from cmae_scale.engine.setup import settle_speed

pytestmark = pytest.mark.dist


Run = Callable[..., tuple[Tensor, ...]]


def record_on_cpu(
    functions: Sequence[Run], samples: Sequence[tuple[Tensor, ...]], *, allow_unused_input: bool
) -> list[Run]:
    """Instead of torch.cuda.make_graphed_callables: arguments, results and gradients have fixed places."""
    assert allow_unused_input
    return [_replay(run, inputs) for run, inputs in zip(functions, samples, strict=True)]


def _replay(run: Run, inputs: tuple[Tensor, ...]) -> Run:
    learning = [value for value in inputs if value.requires_grad]
    results = [result.detach().clone() for result in run(*inputs)]
    gradients = [torch.zeros_like(value) for value in learning]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
            for place, value in zip(inputs, given, strict=True):
                assert (place.shape, place.dtype) == (value.shape, value.dtype)
                if place.data_ptr() != value.data_ptr():
                    assert not isinstance(place, nn.Parameter), "parameters have moved"
                    place.data.copy_(value)
            with torch.set_grad_enabled(bool(learning)):
                ctx.results = run(*inputs)
            for place, result in zip(results, ctx.results, strict=True):
                place.copy_(result.detach())
            return tuple(result.detach() for result in results)

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
            pairs = [pair for pair in zip(ctx.results, given, strict=True) if pair[0].requires_grad]
            outputs, arrived = zip(*pairs, strict=True)
            fresh = torch.autograd.grad(outputs, learning, arrived)
            for place, gradient in zip(gradients, fresh, strict=True):
                place.copy_(gradient)
            rest = iter(gradients)
            return tuple(next(rest).detach() if value.requires_grad else None for value in inputs)

    return Replay.apply


SHARED = {"model": {"feature_decoder": {"shared": True, "depth": 1, "embed_dim": 16, "num_heads": 2}}}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"target": {"mask_ratio": 0.5}},
        {"loss": {"weight": 0.0}},
        SHARED,
        {"model": {"feature_decoder": {"depth": 0}}},
        {"model": {"remat": "full"}},
        {"model": {"skip_redundant": True}},
        {"model": {**SHARED["model"], "skip_redundant": True}},
    ],
    ids=["cmae", "masked target", "mae", "shared decoder", "no decoder", "remat", "skip", "skip shared"],
)
def test_replayed_networks_train_to_the_same_bits(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    accumulation: int,
    method: dict[str, Any],
) -> None:
    def train(*, replays: bool) -> Any:
        run = tiny_run(stage=stage, accumulation=accumulation, cmae=method)
        if replays:
            cuda_graphs.make_graphed_callables = record_on_cpu
            named = run.settings.model_copy(update={"cuda_graphs": "on"})
            setup.settle_speed = lambda run, device: (replace(run, settings=named), [])
        return train_tiny(run, steps=3)

    plain, replayed = (
        on_ranks(lambda replays=replays: train(replays=replays), ranks=1)[0] for replays in (False, True)
    )
    for step, losses in plain["losses"].items():
        assert torch.equal(replayed["losses"][step], losses)
    for name, value in plain["weights"].items():
        assert torch.equal(replayed["weights"][name], value), name


@pytest.mark.parametrize("asked_for", [False, True])
def test_where_a_rank_cannot_record_all_run_as_before(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    asked_for: bool,
) -> None:
    def train(*, records: bool) -> Any:
        import os

        def record(*args: Any, **options: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return record_on_cpu(*args, **options)

        run = tiny_run(ranks=2, cmae={"cuda_graphs": "on" if records and asked_for else "auto"})
        if records:
            cuda_graphs.make_graphed_callables = record
            named = run.settings.model_copy(update={"cuda_graphs": "on"})
            setup.settle_speed = lambda run, device: (replace(run, settings=named), [])
        try:
            return train_tiny(run, steps=2)
        except ConfigError as error:
            return str(error)

    answers = on_ranks(lambda: train(records=True), ranks=2)
    if asked_for:
        for told in answers:
            assert told.startswith('cmae.cuda_graphs "on": recording failed (operation not permitted')
        return
    for answer, plain in zip(answers, on_ranks(lambda: train(records=False), ranks=2), strict=True):
        assert any("no CUDA graphs" in notice for notice in answer["notices"])
        assert all(torch.equal(plain["losses"][step], answer["losses"][step]) for step in range(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2)])
def test_a_gpu_replays_what_it_would_launch(
    tiny_run: Callable[..., Any], train_tiny: Callable[..., Any], stage: int, accumulation: int
) -> None:
    def train(graphs: str) -> Any:
        cmae = {
            "cuda_graphs": graphs,
            "compile": "none",
            "model": {"attention": "math"},
            "checkpoint": {"resume": "never"},
        }
        return train_tiny(tiny_run(stage=stage, accumulation=accumulation, cmae=cmae), steps=4)

    launched, replayed = train("off"), train("on")
    for step, losses in launched["losses"].items():
        torch.testing.assert_close(replayed["losses"][step], losses, rtol=2e-6, atol=0)
    for name, value in launched["weights"].items():
        torch.testing.assert_close(replayed["weights"][name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("remat", ["none", "full", "selective"])
@pytest.mark.parametrize("failure", [None, "no C compiler"])
def test_what_auto_comes_to(
    tiny_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    stage: int,
    remat: str,
    failure: str | None,
) -> None:
    monkeypatch.setattr(setup, "try_to_compile", lambda device: failure)
    run, told = settle_speed(
        tiny_run(stage=stage, cmae={"model": {"remat": remat}}), device=torch.device(device)
    )
    can_gain = device == "cuda" and stage < 3
    assert run.cmae.cuda_graphs == ("on" if can_gain else "off")
    own, _ = settle_speed(
        tiny_run(stage=stage, activation_checkpointing={}), device=torch.device(device)
    )  # DeepSpeed's checkpointing cannot be recorded
    assert own.cmae.cuda_graphs == "off"
    is_tried = can_gain and remat != "selective"
    assert run.cmae.compile == ("blocks" if is_tried and failure is None else "none")
    assert run.cmae.fused_views == ("on" if device == "cuda" and failure is None else "off")
    assert bool(told) == (device == "cuda" and failure is not None)
    assert all("no C compiler" in text for text in told)


@pytest.mark.parametrize(
    ("name", "device", "stage", "told"),
    [
        ("cuda_graphs", "cuda", 3, "zero_optimization.stage=2"),
        ("cuda_graphs", "cpu", 0, "needs a GPU"),
        ("fused_views", "cpu", 0, "needs a GPU"),
    ],
)
def test_what_is_asked_for_and_cannot_be_is_told(
    tiny_run: Callable[..., Any], name: str, device: str, stage: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        settle_speed(tiny_run(stage=stage, cmae={name: "on"}), device=torch.device(device))


@pytest.mark.parametrize("compiles", ["none", "blocks"])
def test_what_is_named_stays(tiny_run: Callable[..., Any], compiles: str) -> None:
    named = {"cuda_graphs": "off", "compile": compiles, "fused_views": "off"}
    run, _ = settle_speed(tiny_run(cmae=named), device=torch.device("cuda"))
    assert (run.cmae.cuda_graphs, run.cmae.compile) == ("off", compiles)
