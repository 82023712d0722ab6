import pytest

from cmae_scale.layers import attention as timing
from cmae_scale.layers.attention import LEAST_ROUNDS, ROUNDS, time_in_turns


def test_ways_take_turns_and_the_least_time_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"steady": [9.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], "noisy": [1.0, 8.0, 3.0, 1.5, 4.0, 7.0, 9.0]}
    least, order = clock_of(costs, monkeypatch)
    assert least == [2.0, 1.5]  # the first of each warms up
    assert order == ["steady", "noisy"] * (ROUNDS + 1)


def test_a_hopeless_way_is_not_tried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"fast": [5.0] + [1.0] * ROUNDS, "slow": [9.0] * ROUNDS}
    least, order = clock_of(costs, monkeypatch)
    assert least == [1.0, 9.0]
    assert order.count("slow") == LEAST_ROUNDS + 1


def clock_of(costs: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[str]]:
    """Times of ways that cost so much, run after run, and the order in which they ran."""
    now, order = [0.0], []

    def run(name: str) -> None:
        now[0] += costs[name][order.count(name)]
        order.append(name)

    monkeypatch.setattr(timing.time, "process_time", lambda: now[0])
    return time_in_turns([lambda name=name: run(name) for name in costs]), order
