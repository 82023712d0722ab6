"""The breakdown of a step's time, and traces of chosen steps."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmae_scale.config.schedules import Timetable
from cmae_scale.engine.metrics.step_timer import SPANS, Profiler, StepTimer, read_steps

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`clock(seconds)` lets time pass, which otherwise stands still."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    return pass_time


def test_each_moment_belongs_to_the_innermost_span(clock: Callable[[float], None]) -> None:
    timer = StepTimer(CPU, is_on=True)
    for _ in range(2):
        clock(0.001)
        with timer.span("forward"):
            clock(0.010)
            with timer.span("target"):
                clock(0.004)
            clock(0.020)
        with timer.span("backward"):
            clock(0.050)
    figures = timer.read(2)
    assert set(figures) == {f"ms_{name}" for name in SPANS}
    shown = {name: value for name, value in figures.items() if value}
    assert shown == pytest.approx({"ms_forward": 30, "ms_target": 4, "ms_backward": 50, "ms_other": 1})


def test_reading_begins_anew_also_inside_a_span(clock: Callable[[float], None]) -> None:
    timer = StepTimer(CPU, is_on=True)
    with timer.span("log"):
        clock(0.003)
        assert timer.read(1)["ms_log"] == pytest.approx(3)
        clock(0.002)
    clock(0.001)
    again = timer.read(1)
    assert (again["ms_log"], again["ms_other"]) == pytest.approx((2, 1))
    assert sum(timer.read(1).values()) == 0


def test_an_error_inside_a_span_ends_it(clock: Callable[[float], None]) -> None:
    timer = StepTimer(CPU, is_on=True)
    with pytest.raises(ValueError, match="no"), timer.span("step"):
        raise ValueError("no")
    clock(0.001)
    assert timer.read(1)["ms_other"] == pytest.approx(1)


def test_two_modules_make_a_span_from_the_first_to_the_last(clock: Callable[[float], None]) -> None:
    class Slow(nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            clock(0.005)
            return values

    timer, first, last = StepTimer(CPU, is_on=True), Slow(), Slow()
    timer.watch_(first, last, name="target")
    with timer.span("forward"):
        last(first(torch.ones(1)))
        clock(0.001)
    figures = timer.read(1)
    assert (figures["ms_target"], figures["ms_forward"]) == pytest.approx((10, 1))


def test_switched_off_it_costs_less_than_a_microsecond_and_says_nothing() -> None:
    timer, module = StepTimer(CPU, is_on=False), nn.Linear(1, 1)
    timer.watch_(module, module, name="target")
    assert not module._forward_hooks
    assert timer.read(1) == {}
    begun = time.process_time()
    for _ in range(20_000):
        with timer.span("forward"):
            pass
    assert time.process_time() - begun < 20_000 * 2e-6  # a tenth of that on an idle machine


@pytest.mark.gpu
def test_on_a_gpu_the_gpus_own_time_counts() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    timer, matrix = StepTimer(device, is_on=True), torch.randn(4096, 4096, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    timer.read(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with timer.span("forward"):
        begin.record()
        for _ in range(20):
            matrix @ matrix
        end.record()
    figures = timer.read(1)
    assert figures["ms_forward"] == pytest.approx(begin.elapsed_time(end), rel=0.1)


@pytest.mark.parametrize(("text", "steps"), [("10-12", range(9, 12)), ("1", range(1))])
def test_steps_to_trace_are_counted_as_in_the_metrics(text: str, steps: range) -> None:
    assert read_steps(text) == steps


def test_a_trace_holds_the_chosen_steps_alone(tmp_path: Path) -> None:
    timer = StepTimer(CPU, is_on=False)
    trace = Profiler(range(1, 3), folder=tmp_path / "profile", device=CPU, timer=timer)
    told = []
    for step in range(4):
        trace.before(step)
        with timer.span("forward"):
            torch.ones(step + 3, step + 3) @ torch.ones(step + 3, step + 3)
        told.append(trace.after(step))
    assert trace.close() is None
    assert told[:2] == [None, None]
    assert "trace of steps 2-3" in str(told[2])
    assert told[3] is None
    events = json.loads((tmp_path / "profile" / "trace_2-3.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "forward" for event in events) == 2
    assert sum(event.get("name") == "aten::mm" for event in events) == 2
    assert "aten::mm" in (tmp_path / "profile" / "operations_2-3.txt").read_text()


def test_a_trace_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trace = Profiler(range(1), folder=tmp_path / "file", device=CPU, timer=StepTimer(CPU, is_on=False))
    trace.before(0)
    assert "warning: the trace of steps 1-1 cannot be written" in str(trace.after(0))


def run_loop(run: Any, *, steps: int) -> Path:
    """The training loop itself, on images in memory."""
    from cmae_scale.config.batches import plan_batch
    from cmae_scale.config.schedules import TargetMomentum, WarmupCosine
    from cmae_scale.data.decoding import BadSamples
    from cmae_scale.data.stream import CropBatch
    from cmae_scale.engine.loop import open_logger, take_steps
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.process.group import start_processes
    from cmae_scale.engine.setup import start_pretraining, watch_health

    context = start_processes()
    batch = plan_batch(run.deepspeed, ranks=context.world.size)
    state = start_pretraining(run, context=context, data_order="none")
    task = Pretraining(state, batch, TargetMomentum(0.9, total_steps=steps), watch_health(state))
    times = Timetable(steps_per_epoch=steps, total_steps=steps, warmup_steps=1, save_every_steps=steps)
    logger = open_logger(task, times=times)
    side = run.cmae.views.master_px
    crops = (
        CropBatch(
            torch.randint(0, 256, (batch.micro, 1, 3, side, side), dtype=torch.uint8),
            torch.zeros(batch.micro, dtype=torch.int64),
            (),
            step,
            micro,
        )
        for step in range(steps)
        for micro in range(batch.accumulation)
    )
    lr = WarmupCosine(peak=1e-3, total_steps=steps, warmup_steps=1)
    bad = BadSamples(0.1)
    take_steps(task, logger, lambda _: nullcontext(crops), steps=range(steps), lr=lr, bad=bad)
    logger.close()
    return logger.path


@pytest.mark.slow_unless(stage=3)
@pytest.mark.dist
@pytest.mark.parametrize(("stage", "ranks", "accumulation"), [(0, 1, 2), (3, 2, 1)])
def test_a_run_writes_breakdown_health_and_trace(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    stage: int,
    ranks: int,
    accumulation: int,
) -> None:
    monitor = {"breakdown": True, "profile": "2-3", "log_every": 2}
    run = tiny_run(ranks=ranks, stage=stage, accumulation=accumulation, cmae={"monitor": monitor})
    path = on_ranks(lambda: run_loop(run, steps=4), ranks=ranks)[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        for name in ("augment", "forward", "target", "backward", "step", "ema"):
            assert line[f"ms_{name}"] > 0, name
        parts = [
            line[f"grad_norm_{part}"] for part in ("encoder", "pixel_decoder", "feature_decoder", "heads")
        ]
        assert line["grad_norm"] == pytest.approx(sum(part**2 for part in parts) ** 0.5)
        assert 0 < line["query_spread"] <= 1.01
        assert 0 < line["target_distance"] < 1
        assert line["contrast_vs_chance"] == pytest.approx(line["contrast"] / torch.tensor(8.0).log().item())
    assert lines[1]["ms_log"] > 0
    folder = path.parent / "profile"
    assert sorted(file.name for file in folder.iterdir()) == ["operations_2-3.txt", "trace_2-3.json"]
    events = json.loads((folder / "trace_2-3.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "backward" for event in events) == 2 * accumulation


@pytest.mark.slow
@pytest.mark.dist
def test_looking_closely_changes_no_loss(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    losses = []
    for number, monitor in enumerate(
        [{"health": False}, {"breakdown": True, "profile": "1-4", "log_every": 1}]
    ):
        settings = {"out": str(tmp_path / str(number)), "monitor": {"log_every": 1, **monitor}}
        run = tiny_run(ranks=2, stage=3, cmae=settings)
        path = on_ranks(lambda run=run: run_loop(seeded(run), steps=4), ranks=2)[0]
        losses.append([json.loads(line)["loss"] for line in path.read_text().splitlines()])
    assert losses[0] == losses[1]


def seeded(run: Any) -> Any:
    torch.manual_seed(0)
    return run
