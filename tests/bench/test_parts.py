"""bench parts: what is compared computes the same; what is told is what was measured."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cmae_scale.benchmarks import parts
from cmae_scale.benchmarks.arguments import build_bench_parser
from cmae_scale.benchmarks.parts import PARTS, Part, Scale, describe_part, measure_parts, time_part
from cmae_scale.report.records import Timing

TINY = Scale(embed_dim=16, depth=2, images=8, img_px=32, samples=12, sample_bytes=1000, is_tiny=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many as before: what is measured takes one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PARTS)
def test_every_way_of_a_part_is_timed(name: str) -> None:
    told: list[str] = []
    results = measure_parts([name], rounds=2, tell=told.append, scale=TINY)
    assert len(told) == len(results) > 0
    for ways in results.values():
        assert len(ways) > 1
        assert all(len(runs) == 2 and min(run.wall_s for run in runs) > 0 for runs in ways.values())


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
