import io
import math

import pytest

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.schedules import Clock, TargetMomentum, WarmupCosine, plan_timetable, read_steps
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.terminal import Progress, format_seconds

CLOCK = Clock(steps_per_epoch=313, batch_samples=4096, total_steps=1000)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("300ep", 93900),
        ("0.5ep", 156),
        ("5000st", 5000),
        ("1.5Msamples", 366),
        ("40960samples", 10),
        ("2%", 20),
    ],
)
def test_durations_become_steps(text: str, steps: int) -> None:
    assert read_steps(text, clock=CLOCK, key="here") == steps


@pytest.mark.parametrize("text", ["", "5", "ep", "-1ep", "1e3st", "5 ep", "5epochs"])
def test_other_texts_are_refused_with_the_place(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: "):
        read_steps(text, clock=CLOCK, key="here")


def timetable_config(**schedule: str) -> CmaeConfig:
    return CmaeConfig.model_validate(
        {"model": {"encoder": "vit_tiny"}, "data": {"shards": "x"}, "schedule": schedule}
    )


def test_warmup_and_saves_may_be_shares_of_the_run() -> None:
    times = plan_timetable(
        timetable_config(duration="10ep", warmup="10%"), steps_per_epoch=20, batch_samples=4
    )
    assert (times.total_steps, times.warmup_steps, times.save_every_steps) == (200, 20, 10)


@pytest.mark.parametrize("duration", ["50%", "0st", "1samples"])
def test_a_run_needs_at_least_one_step(duration: str) -> None:
    with pytest.raises(ConfigError, match=r"cmae\.schedule\.duration"):
        plan_timetable(timetable_config(duration=duration), steps_per_epoch=20, batch_samples=4)


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine() -> None:
    lr = WarmupCosine(peak=2.4e-3, total_steps=110, warmup_steps=10, warmup_start=1e-4, min_lr=1e-6)
    assert lr.at(0) == pytest.approx(2.4e-7)
    assert lr.at(5) == pytest.approx(2.4e-3 * (1e-4 + 0.9999 * 0.5))
    assert lr.at(10) == pytest.approx(2.4e-3)
    assert lr.at(60) == pytest.approx((2.4e-3 + 1e-6) / 2)
    assert lr.at(110) == pytest.approx(1e-6)
    rates = [lr.at(step) for step in range(111)]
    assert max(rates) == lr.at(10)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_without_warmup_starts_at_the_peak() -> None:
    assert WarmupCosine(peak=1.0, total_steps=10, warmup_steps=0).at(0) == 1.0


def test_target_momentum_is_constant_or_rises_to_one() -> None:
    assert TargetMomentum(0.996, total_steps=100).at(99) == 0.996
    rising = TargetMomentum(0.996, total_steps=100, is_cosine=True)
    assert rising.at(0) == pytest.approx(0.996)
    assert rising.at(50) == pytest.approx(1 - 0.004 / 2)
    assert rising.at(100) == pytest.approx(1.0)
    assert math.isclose(rising.at(25), 1 - 0.002 * (1 + math.cos(math.pi / 4)))


def test_progress_writes_plain_lines_away_from_a_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(100, first_step=40, stream=stream)
    progress.report(40, {"loss": "1.00"})
    progress.report(50, {"loss": "0.50"})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step  40/100  loss 1.00  left ?"
    assert lines[1].startswith("step  50/100  loss 0.50  left ")
    assert "\x1b" not in stream.getvalue()


def test_progress_rewrites_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.report(1, {})
    progress.report(2, {})
    progress.close()
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 2


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12s"), (250, "4m 10s"), (11100, "3h 05m"), (93600, "1d 02h")]
)
def test_seconds_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
