"""Data that one rank cannot read, or a request to leave, is known to all ranks at the same step."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cmae_scale.core.errors import DataError
from cmae_scale.engine.process.agreement import Answer, PeerFailedError, RankAgreement
from cmae_scale.engine.process.signals import InterruptedRunError, StopRequest


def test_alone_it_is_the_work_itself() -> None:
    def fail() -> None:
        raise DataError("cut")

    assert RankAgreement(StopRequest()).answer(lambda: 3) == Answer(3, None)
    with pytest.raises(DataError, match="cut"):
        RankAgreement(StopRequest()).answer(fail)


@pytest.mark.dist
@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError])
def test_when_one_rank_fails_all_end_at_the_same_step(
    on_ranks: Callable[..., list[Any]], kind: type[Exception]
) -> None:
    def run() -> tuple[int, str, str]:
        from cmae_scale.engine.process.group import start_processes

        rank = start_processes().world.rank
        agreement = RankAgreement(StopRequest())

        def read(step: int) -> int:
            if rank == 1 and step == 3:
                raise kind("shard is cut")
            return step

        for step in range(10):
            try:
                assert agreement.answer(lambda step=step: read(step)) == Answer(step, None)
            except (kind, PeerFailedError) as error:
                return step, type(error).__name__, str(error)
        raise AssertionError("nothing failed")

    first, second = on_ranks(run, ranks=2)
    assert first[:2] == (3, "PeerFailedError")
    assert "rank 1" in first[2]
    assert second == (3, kind.__name__, "shard is cut")


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_is_answered_by_all_at_the_same_step(
    on_ranks: Callable[..., list[Any]], number: signal.Signals
) -> None:
    def run() -> tuple[int, str | None]:
        from cmae_scale.engine.process.group import start_processes

        rank = start_processes().world.rank
        with StopRequest() as stop:
            stop.hold()
            agreement = RankAgreement(stop)
            for step in range(10):
                if rank == 1 and step == 4:
                    os.kill(os.getpid(), number)
                request = agreement.answer(lambda: None).request
                if request is not None:
                    return step, request
        raise AssertionError("nobody asked")

    assert on_ranks(run, ranks=2) == [(4, number.name)] * 2


def test_a_request_ends_a_wait_for_data() -> None:
    with StopRequest() as stop:
        stop.hold()
        timer = threading.Timer(0.2, lambda: stop.tell("SIGTERM"))
        timer.start()
        assert RankAgreement(stop).answer(lambda: threading.Event().wait()) == Answer(None, "SIGTERM")


def test_before_there_is_anything_to_save_a_signal_ends_the_process_at_once() -> None:
    with StopRequest() as stop:
        with pytest.raises(InterruptedRunError, match="before the first step") as error:
            os.kill(os.getpid(), signal.SIGTERM)
        assert error.value.exit_status == 75
        with pytest.raises(InterruptedRunError):  # also where something caught the first
            stop.hold()


def test_the_same_request_may_come_as_several_signals() -> None:
    with StopRequest() as stop:
        stop.hold()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):  # as the deepspeed launcher does
            os.kill(os.getpid(), number)
        assert stop.name == "SIGINT"


def test_handlers_of_the_caller_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
