"""bench parts: what is compared computes the same; what is told is what was measured."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmae_scale.benchmarks import parts, start_parts, step_parts
from cmae_scale.benchmarks.arguments import build_bench_parser
from cmae_scale.benchmarks.data_parts import draw_photographs
from cmae_scale.benchmarks.parts import GROUPED, PARTS, measure_parts
from cmae_scale.benchmarks.step_parts import FP32, check_official, make_images, open_runs
from cmae_scale.benchmarks.timing import Part, Scale, describe_part, time_part
from cmae_scale.core.errors import ConfigError
from cmae_scale.models import build_cmae
from cmae_scale.report.records import Timing

TINY = Scale(embed_dim=16, depth=2, images=8, img_px=32, samples=12, sample_bytes=1000, is_tiny=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before: what is measured takes one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PARTS)
def test_every_way_of_a_part_is_timed(name: str, request: pytest.FixtureRequest) -> None:
    def measure() -> tuple[list[str], dict[str, dict[str, list[Timing]]]]:
        told: list[str] = []
        return told, measure_parts([name], rounds=2, tell=told.append, scale=TINY)

    if name in GROUPED:  # a process group of this very process would meet other tests
        ((told, results),) = request.getfixturevalue("on_ranks")(measure, ranks=1)
    else:
        told, results = measure()
    assert len(told) == len(results) > 0
    for ways in results.values():
        assert len(ways) > 1
        assert all(len(runs) == 2 and min(run.wall_s for run in runs) > 0 for runs in ways.values())


def test_an_official_way_with_another_loss_or_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_runs("vits", TINY) as read:
        run = read(FP32)
        images, model, loss = make_images(run), build_cmae(run.cmae), step_parts.official_loss
        check_official(model, run, images)

        def louder(*args: Any, **options: Any) -> Tensor:
            return 1.001 * loss(*args, **options)

        def steeper(*args: Any, **options: Any) -> Tensor:
            right = loss(*args, **options)
            return right + 0.001 * (right - right.detach())

        for wrong in (louder, steeper):
            monkeypatch.setattr(step_parts, "official_loss", wrong)
            with pytest.raises(AssertionError):
                check_official(model, run, images)


def test_parts_with_engines_come_last(
    on_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def note_group(scale: Scale) -> Iterator[Part]:
        had_group = torch.distributed.is_initialized()
        yield Part({"ours": lambda: None}, 1, f"with {had_group}")

    def measure() -> list[str]:
        for name in ("engine", "start", "step"):
            monkeypatch.setitem(PARTS, name, note_group)
        return list(measure_parts(["engine", "start", "step"], rounds=1, tell=lambda text: None))

    (titles,) = on_ranks(measure, ranks=1)
    assert titles == ["start, a with False", "engine, a with True", "step, a with True"]


def test_decoded_images_are_as_large_as_photographs() -> None:
    sizes = [len(data) / 448**2 for data in draw_photographs(4, side=448)]
    assert all(0.4 < size < 0.7 for size in sizes), sizes


def test_a_command_that_fails_to_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_parts, "QUICKSTART", "nothing.json")
    part = next(PARTS["start"](TINY))
    with pytest.raises(ConfigError, match=r"cmae_scale\.plan.* ended with 2 \(error: "):
        part.ways["plan"]()


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    part = Part({"ours": lambda: calls.append("a"), "other": lambda: calls.append("b")}, 4, "image")
    timings = time_part(part, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(runs) for runs in timings.values()] == [2, 2]


def test_ours_is_what_others_are_told_by() -> None:
    part = Part({"ours": lambda: None, "other": lambda: None}, 1, "update")
    timings = {"ours": [Timing(2e-6, 1), Timing(4e-6, 1)], "other": [Timing(5e-6, 1)]}
    lines = describe_part("ema", part, timings).splitlines()
    assert lines[0].split()[:5] == ["ema,", "CPU", "time", "of", "an"]
    assert lines[1].split() == ["ours", "2.0", "1.00x"]
    assert lines[2].split() == ["other", "5.0", "2.50x"]


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.TargetEma, "update_", lambda self, momentum: None)
    with pytest.raises(AssertionError):
        next(PARTS["ema"](TINY))


def test_the_command_offers_every_part() -> None:
    args = build_bench_parser("x", examples="").parse_args(["parts", "--only", *PARTS])
    assert args.only == list(PARTS)


def test_the_record_has_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmae_scale.bench import main

    monkeypatch.setattr(parts, "Scale", lambda: TINY)
    assert main(["parts", "--only", "ema", "--rounds", "1", "--record", str(tmp_path / "parts.json")]) == 0
    record = json.loads((tmp_path / "parts.json").read_text())
    assert record["config"]["threads"] == 1
    assert record["hardware"]
    assert set(record["results"]) == {"ema, a update"}
