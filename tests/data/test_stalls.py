"""Calls with a time limit: their results, their errors, and what happens to those that never return."""

import gc
import os
import threading
import time
from collections.abc import Callable

import pytest

from cmae_scale.data.stalls import call_within


def test_results_and_errors_come_back() -> None:
    assert call_within(60, lambda: 6 * 7) == 42
    with pytest.raises(KeyError, match="gone"):
        call_within(60, lambda: {}["gone"])
    assert call_within(60, lambda: "after") == "after"


def test_who_takes_too_long_is_left_behind_and_disturbs_nobody() -> None:
    release = threading.Event()
    with pytest.raises(TimeoutError) as raised:
        call_within(0.2, lambda: release.wait())
    assert raised.value.strerror == "nothing came for 0.2 s"
    assert call_within(60, lambda: "next") == "next"
    release.set()
    assert call_within(60, lambda: "not the old answer") == "not the old answer"


def test_every_thread_waits_for_its_own_call() -> None:
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        answers[number] = [call_within(60, lambda step=step: number * 100 + step) for step in range(50)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [number * 100 + step for step in range(50)] for number in range(8)}


def test_helpers_end_with_the_thread_that_they_helped() -> None:
    before = threading.active_count()
    for _ in range(5):
        thread = threading.Thread(target=lambda: call_within(60, lambda: None))
        thread.start()
        thread.join()
    gc.collect()
    wait_for(lambda: threading.active_count() <= before)


def test_a_forked_process_has_a_helper_of_its_own() -> None:
    call_within(60, lambda: None)
    if (child := os.fork()) == 0:
        os._exit(call_within(60, lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def wait_for(happens: Callable[[], bool]) -> None:
    while not happens():
        time.sleep(0.01)
