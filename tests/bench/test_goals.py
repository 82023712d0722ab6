"""Goals beside records: what is met, missed by how much, not measured."""

import json
from pathlib import Path

import pytest

from cmae_scale.benchmarks.goals import Goal, judge


@pytest.mark.parametrize(
    ("goal", "is_met", "told"),
    [
        (Goal("x", 0.5, 0.6), True, "x: 0.6, goal at least 0.5, met"),
        (Goal("x", 0.5, 0.4), False, "x: 0.4, goal at least 0.5, missed by 20 %"),
        (Goal("x", 8, 10, is_ceiling=True), False, "x: 10, goal at most 8, missed by 25 %"),
        (Goal("x", 8, 8, is_ceiling=True), True, "x: 8, goal at most 8, met"),
        (Goal("x", 8, None, is_ceiling=True), None, "x: not measured, goal at most 8"),
    ],
)
def test_a_goal_says_whether_it_is_met(goal: Goal, is_met: bool | None, told: str) -> None:
    assert goal.is_met == is_met
    assert str(goal).replace("%", " %").replace("  ", " ") == told


def test_a_record_is_judged_by_the_best_that_it_has() -> None:
    step = {"ms_per_step": 50.0, "images_per_s": 2560.0, "spans": {"ms_augment": 2.0}}
    results = {
        "steps": {
            "vits, 128 x 1": {**step, "mfu": 0.1, "peak_gib": 8.0, "predicted_gib": 10.0},
            "vits, 512 x 1": {**step, "mfu": 0.3, "peak_gib": 11.0, "predicted_gib": 10.0},
            "vits, 64 x 1": {"failed": "out of memory"},
            "vitl, 64 x 1": {"failed": "out of memory"},
        },
        "waits": {"a step": {"waits": 5}},
        "loader": {"4 workers": {"images_per_s": 1280.0}, "end": {"is_quick": True}},
        "kernels": {"a": {"flash": 0.4, "math": None, "torch's pick": 0.5}},
    }
    found = {goal.name: goal.found for goal in judge(results)}
    assert found["ViT-S, share of the peak"] == 0.3
    assert found["ViT-L, share of the peak"] is None
    assert found["views, us an image"] == pytest.approx(2000 / 128)
    assert found["with the loader, share of ViT-S steps without"] == 0.5
    assert found["memory, beside what plan says"] == pytest.approx(1.1)
    assert found["attention, torch's pick beside the best"] == pytest.approx(1.25)
    assert found["waits of a step for the GPU"] == 5


def test_records_of_every_age_are_judged(repository: Path) -> None:
    records = sorted((repository / "tests" / "bench" / "records").glob("gpu*.json"))
    assert records
    for record in records:
        assert all(str(goal) for goal in judge(json.loads(record.read_text())["results"]))
    assert all(goal.found is None for goal in judge({}))
