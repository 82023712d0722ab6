"""A step that goes wrong leaves no trace, at any stage and precision, and its message names the culprit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.config.cmae import FaultsConfig
from cmae_scale.core.errors import DivergedError
from cmae_scale.engine.skipped_steps import SkippedSteps
from cmae_scale.engine.step_guard import MAX_OVERFLOWS, BadStep, LossStatistics, NonFiniteGuard

PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
}
RANKS = [(2, 2)]  # the hardest: fewer ranks and micro-batches are less of the same


def leave_out(folder: Path, step: int) -> None:
    """Have a run pass over `step` as if it had never been: its batch contributes nothing."""
    folder.mkdir(parents=True)
    (folder / "skipped_steps.jsonl").write_text(json.dumps({"step": step}) + "\n")


def assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, other in zip(answers, expected, strict=True):
        for name, value in other["weights"].items():
            assert torch.equal(answer["weights"][name], value), name
        assert len(answer["moments"]) == len(other["moments"]) > 0
        assert all(torch.equal(a, b) for a, b in zip(answer["moments"], other["moments"], strict=True))


@pytest.mark.slow_unless(stage=2, precision="fp32")
@pytest.mark.slow_unless(stage=3, precision="bf16")
@pytest.mark.dist
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "accumulation"), RANKS)
def test_a_bad_step_equals_a_batch_that_never_was(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
    ranks: int,
    accumulation: int,
    stage: int,
    precision: str,
) -> None:
    def run(name: str) -> Any:
        return tiny_run(
            ranks=ranks,
            stage=stage,
            accumulation=accumulation,
            cmae={"out": str(tmp_path / name)},
            gradient_clipping=1.0,
            **PRECISIONS[precision],
        )

    culprit = ranks - 1
    faults = ((1, culprit, "loss"), (3, culprit, "gradient"))
    answers = on_ranks(lambda: run_loop(run("bad"), faults=faults), ranks=ranks)
    leave_out(tmp_path / "without", 1)
    with (tmp_path / "without" / "skipped_steps.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3}) + "\n")
    expected = on_ranks(lambda: run_loop(run("without")), ranks=ranks)
    assert_same(answers, expected)
    first, second = answers[0]["said"]
    for said, cause, step in ((first, "loss", 1), (second, "gradient", 3)):
        assert f"the {cause} is not finite at step {step} on rank {culprit} (loss " in said
        assert f"samples {step}-{8 // ranks * culprit}, " in said
        assert "left out" in said
    lines, others = ([json.loads(line) for line in answer[0]["lines"]] for answer in (answers, expected))
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 2, 2, 2]
    for line, other in zip(lines, others, strict=True):
        assert all(line[name] == other[name] for name in ("step", "loss", "lr", "grad_norm"))
    assert lines[1]["loss"] is None


@pytest.mark.slow_unless(stage=2)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_run_leaves_out_the_same_steps(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
    stage: int,
) -> None:
    def run(name: str) -> Any:
        return tiny_run(ranks=2, stage=stage, cmae={"out": str(tmp_path / name)})

    once = ((3, 1, "loss", 1),)
    whole = on_ranks(lambda: run_loop(run("whole"), faults=once), ranks=2)
    # killed after step 4, before its state: what went wrong once need not go wrong again
    on_ranks(lambda: run_loop(run("killed"), faults=once, save_every=2, end=2), ranks=2)
    on_ranks(lambda: run_loop(run("killed"), faults=once, save_every=100, end=5), ranks=2)
    for state in (tmp_path / "killed" / "checkpoints").glob("step_00000005"):
        state.rename(state.with_name("lost"))
    resumed = on_ranks(lambda: run_loop(run("killed"), faults=once), ranks=2)
    assert resumed[0]["first_step"] == 2
    assert_same(resumed, whole)


@pytest.mark.slow_unless(stage=1)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_rewind_goes_back_to_the_newest_state_once(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
    stage: int,
) -> None:
    def run(name: str, policy: str) -> Any:
        faults = {"bad_step": policy}
        return tiny_run(ranks=2, stage=stage, cmae={"out": str(tmp_path / name), "faults": faults})

    one = ((3, 1, "loss"),)
    rewound = on_ranks(lambda: run_loop(run("rewound", "rewind"), faults=one, save_every=2), ranks=2)
    skipped = on_ranks(lambda: run_loop(run("skipped", "skip"), faults=one, save_every=2), ranks=2)
    assert rewound[0]["computed"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert "back to the checkpoint of step 2" in rewound[0]["said"][0]
    assert_same(rewound, skipped)
    told = ("step", "loss", "skipped_steps")
    lines = [
        [tuple(json.loads(line)[name] for name in told) for line in answer[0]["lines"]]
        for answer in (rewound, skipped)
    ]
    assert lines[0] == lines[1]
    two = ((3, 1, "loss"), (4, 0, "gradient"))
    again = on_ranks(lambda: run_loop(run("again", "rewind"), faults=two, save_every=100), ranks=2)
    assert again[0]["error"] is None  # no state yet: both are left out
    twice = on_ranks(
        lambda: run_loop(run("twice", "rewind"), faults=((2, 1, "loss"), *two), save_every=2), ranks=2
    )
    assert all("again after going back to the checkpoint of step 2" in answer["error"] for answer in twice)


@pytest.mark.dist
def test_stop_ends_all_ranks_with_the_state_before_the_step(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
) -> None:
    run = tiny_run(ranks=2, stage=0, cmae={"faults": {"bad_step": "stop"}})
    bad = ((3, 1, "gradient"),)
    answers = on_ranks(lambda: run_loop(run, faults=bad), ranks=2)
    for answer in answers:
        assert answer["error"].startswith("DivergedError: the gradient is not finite at step 3 on rank 1")
        assert all(value.isfinite().all() for value in answer["weights"].values())
    assert (run.out / "checkpoints" / "latest").read_text() == "step_00000003"
    mended = on_ranks(lambda: run_loop(run), ranks=2)
    whole = on_ranks(
        lambda: run_loop(tiny_run(ranks=2, stage=0, cmae={"out": str(tmp_path / "whole")})), ranks=2
    )
    assert_same(mended, whole)


@pytest.mark.dist
def test_too_many_bad_steps_in_a_row_stop_the_run(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], run_loop: Callable[..., Any]
) -> None:
    run = tiny_run(stage=1, cmae={"faults": {"max_bad_steps": 2}})
    bad = tuple((step, 0, "loss") for step in (0, 2, 3, 4))
    [answer] = on_ranks(lambda: run_loop(run, faults=bad), ranks=1)
    assert "at step 4 on rank 0" in answer["error"]
    assert "after 2 steps in a row were left out" in answer["error"]
    [again] = on_ranks(lambda: run_loop(run, faults=bad), ranks=1)
    assert again["error"] == answer["error"]  # the same command does not march on through bad steps


@pytest.mark.slow_unless(stage=2)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 2])
def test_a_spike_is_left_out_as_a_nan_is(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
) -> None:
    monkeypatch.setattr(LossStatistics, "WARM_STEPS", 2)

    def run(name: str) -> Any:
        return tiny_run(
            ranks=2,
            stage=stage,
            accumulation=2,
            cmae={"out": str(tmp_path / name), "faults": {"spike": 20.0}},
        )

    jump = ((3, 1, "jump"),)
    answers = on_ranks(lambda: run_loop(run("jump"), faults=jump), ranks=2)
    assert "the loss jumped at step 3" in answers[0]["said"][0]
    leave_out(tmp_path / "without", 3)
    assert_same(answers, on_ranks(lambda: run_loop(run("without")), ranks=2))
    on_ranks(lambda: run_loop(run("resumed"), save_every=3, end=3), ranks=2)
    resumed = on_ranks(lambda: run_loop(run("resumed"), faults=jump), ranks=2)
    assert "the loss jumped at step 3" in resumed[0]["said"][0]  # the statistics came with the checkpoint
    assert_same(resumed, answers)


@pytest.mark.dist
def test_an_fp16_overflow_is_no_bad_step(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    tmp_path: Path,
) -> None:
    last = 5  # of six: afterwards the loss scales differ, and with them what else overflows
    half = {"torch_autocast": {"enabled": True, "dtype": "float16"}}

    def run(name: str) -> Any:
        return tiny_run(ranks=2, stage=0, cmae={"out": str(tmp_path / name)}, **half)

    answers = on_ranks(lambda: run_loop(run("overflow"), faults=((last, 1, "gradient"),)), ranks=2)
    assert answers[0]["said"] == []
    assert not (tmp_path / "overflow" / "skipped_steps.jsonl").exists()
    leave_out(tmp_path / "without", last)
    assert_same(
        answers, on_ranks(lambda: run_loop(run("without")), ranks=2)
    )  # the target did not move either


class EngineThatOverflows:
    """What the guard asks of an engine whose every step overflows in fp16."""

    global_rank = 0
    torch_autocast_z0_gradscaler = None
    optimizer = type("Optimizer", (), {"overflow": True, "persistent_parameters": []})()

    def __init__(self, error: str | None = None) -> None:
        self.module, self.error = torch.nn.Linear(1, 1), error

    def fp16_enabled(self) -> bool:
        return True

    def bfloat16_enabled(self) -> bool:
        return False

    def was_step_applied(self) -> bool:
        return False

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self) -> None:
        if self.error:
            raise Exception(self.error)


def test_endless_fp16_overflow_stops_the_run() -> None:
    guard = NonFiniteGuard(EngineThatOverflows(), metric_names=["loss"], device=torch.device("cpu"))
    for step in range(MAX_OVERFLOWS):
        guard.open(step, keys=["a"])
        assert not guard.apply(torch.ones(1))
        assert guard.bad is None
    with pytest.raises(DivergedError, match=f"overflowed {MAX_OVERFLOWS + 1} steps in a row"):
        guard.apply(torch.ones(1))


def test_a_loss_scale_that_cannot_fall_further_stops_the_run() -> None:
    # DeepSpeed's words
    error = "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    guard = NonFiniteGuard(EngineThatOverflows(error), metric_names=["loss"], device=torch.device("cpu"))
    guard.open(7, keys=["a"])
    with pytest.raises(DivergedError, match="fp16 overflows at step 7 at any loss scale"):
        guard.apply(torch.ones(1))


def test_loss_statistics_are_the_mean_and_deviation_of_the_last_losses(rng: torch.Generator) -> None:
    losses = 3 + torch.randn(50, generator=rng, dtype=torch.float64)
    statistics = LossStatistics(torch.zeros(3, dtype=torch.float64))
    for loss in losses:
        statistics.add_(loss)
    count, mean, variance = statistics.values
    assert count == 50
    torch.testing.assert_close(mean, losses.mean())
    torch.testing.assert_close(variance, losses.var(correction=0))
    at = mean + 5 * variance.sqrt()
    assert statistics.is_jump(at + 1e-6, deviations=5)
    assert not statistics.is_jump(at - 1e-6, deviations=5)


@pytest.mark.parametrize("known", [None, [], [1.0, 2.0], [1.0, "2", 3.0], {"a": 1.0}, [1.0, None, 3.0]])
def test_loss_statistics_that_are_none_begin_anew(known: Any) -> None:
    guard = NonFiniteGuard(EngineThatOverflows(), metric_names=["loss"], device=torch.device("cpu"), spike=5)
    extra: dict[str, Any] = {}
    guard.recall({"loss_statistics": [4.0, 2.0, 3.0]})
    guard.remember(extra)
    assert extra == {"loss_statistics": [4.0, 2.0, 3.0]}
    guard.recall({"loss_statistics": known})
    assert guard.statistics.values.tolist() == [0, 0, 0]


def test_a_torn_line_of_skipped_steps_is_no_step(tmp_path: Path) -> None:
    path = tmp_path / "skipped_steps.jsonl"
    path.write_text('{"step": 3}\n{"step": 4')
    skipped = SkippedSteps(path, faults=FaultsConfig(), is_first=True)
    assert 3 in skipped.steps
    assert 4 not in skipped.steps
    bad = BadStep(5, "loss is not finite", (0,), {"0": {"loss": math.nan}}, ("a",))
    assert skipped.decide(bad, newest_state=None) == "skip"
    again = SkippedSteps(path, faults=FaultsConfig(), is_first=True)
    assert again.before(10) == [3, 5]
    with pytest.raises(DivergedError):
        SkippedSteps(path, faults=FaultsConfig(bad_step="stop"), is_first=True).decide(bad, newest_state=3)
