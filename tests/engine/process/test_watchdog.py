"""Ranks that die, freeze, fail or hang are named by the others, who end; a clean end ends nobody else."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import FaultsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.core.world import read_world
from cmae_scale.engine.process.agreement import RankAgreement
from cmae_scale.engine.process.heartbeat import Heartbeat
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.engine.process.watchdog import Watchdog

pytestmark = pytest.mark.dist

PATIENT = FaultsConfig(step_timeout_s=300, peer_timeout_s=300)


@pytest.fixture
def watched(let_ranks_end: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`watched(work)`: how watched ranks end that run `work(rank, heartbeat)` and wait for one another."""

    def run(
        work: Callable[[int, Heartbeat], None], *, ranks: int = 3, faults: FaultsConfig = PATIENT, **more: Any
    ) -> Any:
        def be() -> int | None:
            from cmae_scale.engine.process.group import start_processes

            context = start_processes()
            rank, out = context.world.rank, tmp_path
            watch = Watchdog(
                world=context.world,
                heartbeat=context.heartbeat,
                stop=context.stop,
                faults=faults,
                out=out,
                on_end=lambda cause: (out / f"end_{rank}").write_text(cause) and None,
            )
            with watch:
                try:
                    work(rank, context.heartbeat)
                    meet()
                except DataError as error:
                    watch.report(str(error), is_shared=True)
                    return 2
                except Exception as error:
                    from cmae_scale.engine.process.lifecycle import is_about_peers

                    if is_about_peers(error):
                        watch.await_verdict()
                    watch.report(f"{type(error).__name__}: {error}", is_shared=False)
                    raise
            return 0

        return let_ranks_end(be, ranks=ranks, **more)

    return run


def meet() -> None:
    """Wait for all ranks, in C++, for as long as it takes."""
    import torch.distributed as dist

    dist.barrier()


def notes(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("end_*")}


def test_all_end_well(watched: Callable[..., Any], tmp_path: Path) -> None:
    ended = watched(lambda rank, heartbeat: time.sleep(0.2 * rank))
    assert [(end.status, end.stderr) for end in ended] == [(0, "")] * 3
    assert not notes(tmp_path)


@pytest.mark.slow_unless(victim=0)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named_by_all_others(
    watched: Callable[..., Any], tmp_path: Path, victim: int
) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        heartbeat.enter("computing gradients", step=5)
        time.sleep(3)  # what a rank does is told every second
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    ended = watched(work, faults=FaultsConfig(peer_timeout_s=10))
    assert ended[victim].status == -signal.SIGKILL
    for rank, end in enumerate(ended):
        if rank != victim:
            assert end.status == 1
    speaker = ended[1 if victim == 0 else 0]
    assert f"rank {victim}" in speaker.stderr
    assert "died" in speaker.stderr
    [(name, cause)] = notes(tmp_path).items()
    assert name == f"end_{1 if victim == 0 else 0}"
    assert f"rank {victim}" in cause
    if victim:
        assert "computing gradients, step 5" in cause


@pytest.mark.slow_unless(victim=1)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_rank_is_named_by_all_others(
    watched: Callable[..., Any], tmp_path: Path, victim: int
) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGSTOP)

    ended = watched(work, faults=FaultsConfig(peer_timeout_s=3), frozen=victim)
    assert ended[victim].status is None
    others = [end for rank, end in enumerate(ended) if rank != victim]
    assert [end.status for end in others] == [1, 1]
    assert f"rank {victim}" in others[0].stderr
    assert "has shown no life for 3 s" in others[0].stderr
    if victim:
        assert "warning: rank 1" in others[0].stderr  # a third of the time before


def test_an_error_of_one_rank_ends_the_others_with_its_words(watched: Callable[..., Any]) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        if rank == 2:
            raise ZeroDivisionError("by nothing")

    ended = watched(work)
    assert [end.status for end in ended] == [1, 1, 1]
    assert "Traceback" in ended[2].stderr
    assert "rank 2 (" in ended[0].stderr
    assert "failed: ZeroDivisionError: by nothing" in ended[0].stderr
    assert "Traceback" not in ended[0].stderr


def test_an_error_of_rank_0_ends_the_others_with_its_words(watched: Callable[..., Any]) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        if rank == 0:
            raise ZeroDivisionError("by nothing")

    ended = watched(work)
    assert [end.status for end in ended] == [1, 1, 1]
    assert "Traceback" in ended[0].stderr
    assert "rank 0 failed: ZeroDivisionError: by nothing" in ended[1].stderr


def test_an_error_that_all_ranks_share_ends_each_by_itself(
    watched: Callable[..., Any], tmp_path: Path
) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        time.sleep(0.5 * rank)
        raise DataError("the shard is cut")

    ended = watched(work)
    assert [(end.status, end.stderr) for end in ended] == [(2, "")] * 3
    assert not notes(tmp_path)


@pytest.fixture
def _ranks_that_call_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks but the first are slow to tell rank 0 who they are."""
    from cmae_scale.engine.process import watchdog

    original = watchdog.connect_to_server

    def call_late(*args: Any, **options: Any) -> Any:
        if read_world().rank:
            time.sleep(1)
        return original(*args, **options)

    monkeypatch.setattr(watchdog, "connect_to_server", call_late)


@pytest.mark.usefixtures("_ranks_that_call_late")
def test_ranks_that_are_late_to_call_still_end_by_the_error_that_all_share(
    watched: Callable[..., Any],
) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        raise DataError("the shard is cut")

    assert [(end.status, end.stderr) for end in watched(work)] == [(2, "")] * 3


@pytest.mark.usefixtures("_ranks_that_call_late")
def test_ranks_that_are_late_to_call_still_hear_why_rank_0_ends(watched: Callable[..., Any]) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        if rank == 0:
            raise ZeroDivisionError("by nothing")

    ended = watched(work)
    assert "rank 0 failed: ZeroDivisionError: by nothing" in ended[1].stderr


def test_data_that_only_one_rank_cannot_read_ends_the_others(watched: Callable[..., Any]) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        if rank == 1:
            raise DataError("the shard is cut")

    ended = watched(work)
    assert [end.status for end in ended] == [1, 2, 1]
    assert "failed: the shard is cut" in ended[0].stderr


@pytest.mark.slow_unless(ranks=3)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_stuck_step_leaves_everyones_stacks(
    watched: Callable[..., Any], tmp_path: Path, ranks: int
) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        heartbeat.enter("reading data", step=4)
        if rank == ranks - 1:
            wait_for_a_store()
        heartbeat.enter("waiting for the others", step=4)

    ended = watched(work, ranks=ranks, faults=FaultsConfig(step_timeout_s=2))
    assert [end.status for end in ended] == [1] * ranks
    message = ended[0].stderr
    assert re.search(rf"no progress for \d+ s: rank {ranks - 1} \(", message)
    assert ") reading data, step 4; " in message
    stacks = {path.name: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert set(stacks) == {f"rank_{rank}.txt" for rank in range(ranks)}
    assert "wait_for_a_store" in stacks[f"rank_{ranks - 1}.txt"]
    if ranks > 1:
        assert "in meet" in stacks["rank_0.txt"]


def test_a_rank_that_never_comes_is_waited_for_and_told(let_ranks_end: Callable[..., Any]) -> None:
    def be() -> int:
        from cmae_scale.engine.process.group import PeerMissingError, start_processes

        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            start_processes(timeout_s=3)
        except PeerMissingError as error:
            print(error, file=sys.stderr)
            return 1
        return 0

    waiting, _ = let_ranks_end(be, ranks=2)
    assert waiting.status == 1
    assert re.search(r"rank 0 waited \d+ s for all 2 ranks to come to 127\.0\.0\.1:", waiting.stderr)


def wait_for_a_store() -> None:
    threading.Event().wait()


@pytest.mark.slow
def test_a_run_that_was_stopped_and_continued_as_a_whole_goes_on(watched: Callable[..., Any]) -> None:
    """As a scheduler suspends a job, or a machine sleeps."""

    def work(rank: int, heartbeat: Heartbeat) -> None:
        heartbeat.enter("computing gradients", step=1)
        pid = os.getpid()
        doze = f"sleep 0.5; kill -STOP {pid}; sleep 7; kill -CONT {pid}"
        with subprocess.Popen(["sh", "-c", doze]):
            time.sleep(1)

    ended = watched(work, ranks=2, faults=FaultsConfig(step_timeout_s=4, peer_timeout_s=4))
    assert [(end.status, end.stderr) for end in ended] == [(0, "")] * 2


@pytest.mark.slow
def test_slow_is_not_stuck(watched: Callable[..., Any]) -> None:
    def work(rank: int, heartbeat: Heartbeat) -> None:
        for step in range(12):
            heartbeat.enter("computing gradients", step=step)
            time.sleep(0.5)
        heartbeat.enter("saving a checkpoint", step=12, patience=10)
        time.sleep(6)

    ended = watched(work, ranks=2, faults=FaultsConfig(step_timeout_s=5))
    assert [end.status for end in ended] == [0, 0]


def test_asked_again_after_a_while_a_process_leaves_at_once(
    let_ranks_end: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmae_scale.engine.process.watchdog.PATIENCE_S", 2.0)

    def be() -> int:
        from cmae_scale.engine.process.group import start_processes

        with StopRequest() as stop:
            context = start_processes(stop=stop)
            stop.hold()
            with Watchdog(
                world=context.world,
                heartbeat=context.heartbeat,
                stop=stop,
                faults=FaultsConfig(),
                out=tmp_path,
                on_end=lambda cause: None,
            ):
                (tmp_path / "here").touch()
                threading.Event().wait()
        return 0

    def ask(pids: list[int]) -> None:
        while not (tmp_path / "here").exists():
            time.sleep(0.05)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # one request, as launchers pass it on
            os.kill(pids[0], number)
            time.sleep(0.1)
        assert is_running(pids[0])
        while is_running(pids[0]):
            time.sleep(0.5)
            os.kill(pids[0], signal.SIGTERM)

    [end] = let_ranks_end(be, ranks=1, meanwhile=ask)
    assert end.status == 128 + signal.SIGTERM
    assert "asked to leave again (SIGTERM): leaving at once" in end.stderr


def is_running(pid: int) -> bool:
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow_unless(way="rank 0, in a collective")
@pytest.mark.parametrize("way", ["rank 0, in a collective", "rank 1, waiting for data", "the file"])
def test_a_request_reaches_ranks_that_wait_for_one_another(
    let_ranks_end: Callable[..., Any], tmp_path: Path, way: str
) -> None:
    def be() -> int:
        from cmae_scale.engine.process.group import start_processes

        with StopRequest() as stop:
            context = start_processes(stop=stop)
            stop.hold()
            rank = context.world.rank
            agreement = RankAgreement(stop)
            with Watchdog(
                world=read_world(),
                heartbeat=context.heartbeat,
                stop=stop,
                faults=FaultsConfig(),
                out=tmp_path,
                on_end=lambda cause: None,
            ):
                meet()
                (tmp_path / f"here_{rank}").touch()
                # rank 0 has its data and waits in C++, where no Python handler can run; rank 1's never come
                answer = agreement.answer(lambda: None if rank == 0 else threading.Event().wait())
                (tmp_path / f"answer_{rank}").write_text(json.dumps(answer.request))
        return 75

    def ask(pids: list[int]) -> None:
        while not (tmp_path / "here_0").exists() or not (tmp_path / "here_1").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        match way:
            case "the file":
                (tmp_path / "stop").touch()
            case "rank 0, in a collective":
                os.kill(pids[0], signal.SIGTERM)
            case _:
                os.kill(pids[1], signal.SIGTERM)

    ended = let_ranks_end(be, ranks=2, meanwhile=ask)
    assert [end.status for end in ended] == [75, 75]
    answers = {json.loads((tmp_path / f"answer_{rank}").read_text()) for rank in range(2)}
    assert answers == {"the file stop" if way == "the file" else "SIGTERM"}
    assert not (tmp_path / "stop").exists()
