"""MetricsWriters that fail or stall: training never waits for them and never ends by them."""

import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.engine.metrics import writers
from cmae_scale.engine.metrics.writers import MetricsWriters
from cmae_scale.engine.zero.patches import without_monitors

CSV = {"csv_monitor": {"enabled": True, "output_path": "x", "job_name": "y"}}
TWO = {**CSV, "tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"}}


class Sink:
    """A monitor that keeps what it gets, after doing what the test wants it to."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.events = act, []

    def write_events(self, events: list[Any]) -> None:
        self.act()
        self.events += events


def test_what_is_written_arrives_in_order() -> None:
    sink = Sink(lambda: None)
    opened = MetricsWriters(CSV, is_first=True, say=print, build=lambda *_: sink)
    for step in range(100):
        opened.write([("loss", 1.0, step)])
    opened.close()
    assert sink.events == [("loss", 1.0, step) for step in range(100)]


def test_a_monitor_that_raises_is_told_of_once() -> None:
    def fail() -> None:
        raise OSError("[Errno 28] No space left on device")

    said: list[str] = []
    opened = MetricsWriters(CSV, is_first=True, say=said.append, build=lambda *_: Sink(fail))
    for step in range(10):
        opened.write([("loss", 1.0, step)])
    opened.close()
    assert said == ["warning: csv_monitor does not take metrics ([Errno 28] No space left on device)"]


def test_a_monitor_that_cannot_be_opened_is_told_of() -> None:
    def build(*_: Any) -> Any:
        raise RuntimeError("no such server\nmore")

    said: list[str] = []
    opened = MetricsWriters(CSV, is_first=True, say=said.append, build=build)
    opened.write([("loss", 1.0, 0)])
    opened.close()
    assert said == ["warning: csv_monitor cannot be opened (no such server)"]


def test_a_stalled_monitor_holds_up_neither_training_nor_the_other_monitor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writers, "WAITING_LINES", 10)
    monkeypatch.setattr(writers, "CLOSE_S", 0.2)
    arrived = threading.Semaphore(0)
    stalled, well = Sink(lambda: threading.Event().wait()), Sink(arrived.release)
    said: list[str] = []

    def build(name: str, _: Any) -> Sink:
        return stalled if name == "csv_monitor" else well

    opened = MetricsWriters(TWO, is_first=True, say=said.append, build=build)
    for step in range(50):
        opened.write([("loss", 1.0, step)])
        arrived.acquire()
    opened.close()
    assert len(well.events) == 50
    assert said == ["warning: csv_monitor does not keep up (metrics.jsonl has every line)"]


def test_only_the_first_rank_opens_monitors() -> None:
    opened = MetricsWriters(CSV, is_first=False, say=print, build=lambda *_: pytest.fail("opened"))
    opened.write([("loss", 1.0, 0)])
    opened.close()


def test_the_engine_gets_no_monitors() -> None:
    off = {"timers": {"throughput": {"enabled": False}}}
    assert without_monitors({**TWO, "train_batch_size": 8}) == {"train_batch_size": 8, **off}
    assert without_monitors({"timers": {}, **TWO}) == {"timers": {}}  # the user's own stays


@pytest.fixture
def wandb_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(api=types.SimpleNamespace(api_key="x")))
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_INIT_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is as before when the test ends
        monkeypatch.delenv(name)


def open_wandb(kept: dict[str, Any]) -> tuple[str | None, str | None]:
    """What wandb finds in the environment when it is opened."""
    found: list[str | None] = []

    def build(*_: Any) -> Sink:
        found.extend(os.environ.get(name) for name in ("WANDB_RUN_ID", "WANDB_RESUME"))
        return Sink(lambda: None)

    opened = MetricsWriters(
        {"wandb": {"enabled": True, "project": "none"}}, is_first=True, say=print, kept=kept, build=build
    )
    opened.close()
    return found[0], found[1]


def test_a_run_that_goes_on_is_the_same_one_for_wandb(
    wandb_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    run_id, resume = open_wandb(kept)
    assert resume == "allow"
    assert kept == {"wandb_id": run_id}
    monkeypatch.delenv("WANDB_RUN_ID")
    assert open_wandb(json.loads(json.dumps(kept)))[0] == run_id  # as a state brings it back
    monkeypatch.delenv("WANDB_RUN_ID")
    assert open_wandb({})[0] != run_id  # begun anew
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    assert open_wandb({})[0] == "chosen"


def test_states_keep_nothing_for_monitors_that_are_off() -> None:
    kept: dict[str, Any] = {}
    MetricsWriters(CSV, is_first=True, say=print, kept=kept, build=lambda *_: Sink(lambda: None)).close()
    assert kept == {}


SCRIPT = """
import json, sys, time
from cmae_scale.engine.process.group import start_processes
from cmae_scale.engine.metrics.writers import MetricsWriters
start_processes()
said = []
opened = MetricsWriters({"wandb": {"enabled": True, "project": "none"}}, is_first=True, say=said.append,
                  kept={"wandb_id": "a1b2c3d4"})
opened.write([("loss", 1.0, 0)])
print("WRITTEN", len(said), flush=True)
while not said:
    time.sleep(0.1)
opened.close()
print("RESULT", json.dumps(said), flush=True)
import os; os._exit(0)
"""


@pytest.mark.slow
def test_wandb_without_a_network_is_logged_offline(repository: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nobody answers
        "WANDB_API_KEY": "0" * 40,
        "WANDB_INIT_TIMEOUT": "3",
        "PYTHONPATH": str(repository),
        "DS_ACCELERATOR": "cpu",
    }
    environment.pop("WANDB_MODE", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "WRITTEN 0" in done.stdout  # before wandb had given up
    [result] = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    said = json.loads(result.removeprefix("RESULT "))
    assert said[0].startswith("warning: wandb cannot be reached (")
    assert "this run is logged offline" in said[0]
    assert list(tmp_path.glob("wandb/offline-run-*-a1b2c3d4"))
