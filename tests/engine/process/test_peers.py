"""What rank 0 concludes from what it hears, and the lines it hears it on."""

import socket
from collections.abc import Iterator

import pytest

from cmae_scale.engine.process.heartbeat import Pulse, Report
from cmae_scale.engine.process.peers import Line, Roster, call_desk, find_addresses, open_desk


@pytest.fixture
def roster() -> Roster:
    """Ranks 0 to 3 on two machines, all heard at second 0."""
    roster = Roster(peer_timeout_s=30)
    for rank in range(4):
        roster.hear(rank, {"host": f"node{rank // 2}", "beat": ["computing gradients", 7, 1.0]}, now_s=0)
    return roster


def test_a_line_that_breaks_names_rank_machine_and_place(roster: Roster) -> None:
    verdict = roster.lose(3)
    assert verdict is not None
    assert verdict.startswith("rank 3 (node1) died while computing gradients, step 7")
    roster.hear(2, {"bye": True}, now_s=1)
    assert roster.lose(2) is None


def test_silence_is_warned_of_once_and_then_ends_the_run(roster: Roster) -> None:
    for rank in (0, 1, 3):
        roster.hear(rank, {"beat": ["computing gradients", 8, 0.0]}, now_s=11)
    assert roster.find_lost(now_s=11) is None
    assert roster.find_silent(now_s=11) == ["warning: rank 2 (node1) has shown no life for 11 s"]
    assert roster.find_silent(now_s=12) == []
    for rank in (0, 1, 3):
        roster.hear(rank, {"beat": ["waiting for the others", 8, 0.0]}, now_s=31)
    verdict = roster.find_lost(now_s=31)
    assert verdict is not None
    assert verdict.startswith(
        "rank 2 (node1) has shown no life for 31 s, last seen computing gradients, step 7"
    )


def test_who_was_silent_and_comes_back_is_forgiven(roster: Roster) -> None:
    roster.find_silent(now_s=20)
    for rank in range(4):
        roster.hear(rank, {"beat": ["computing gradients", 8, 0.0]}, now_s=25)
    assert roster.find_silent(now_s=26) == []
    assert roster.find_lost(now_s=40) is None


def test_when_rank_0_was_suspended_nobody_else_is_to_blame(roster: Roster) -> None:
    roster.forgive(now_s=1000)
    assert roster.find_lost(now_s=1001) is None


def test_an_error_of_one_rank_is_told_at_once_and_a_shared_one_after_a_while(roster: Roster) -> None:
    roster.hear(1, {"failed": "DataError: cut", "shared": True}, now_s=5)
    assert roster.find_lost(now_s=6) is None
    assert roster.find_lost(now_s=5 + Roster.GRACE_S) == "rank 1 (node0) failed: DataError: cut"
    for rank in (0, 2, 3):
        roster.hear(rank, {"failed": "the same", "shared": True}, now_s=6)
    assert roster.find_lost(now_s=20) is None  # all ended by themselves
    other = Roster(peer_timeout_s=30)
    for rank in range(2):
        other.hear(rank, {"host": "a"}, now_s=0)
    other.hear(1, {"failed": "ZeroDivisionError: x", "shared": False}, now_s=5)
    assert other.find_lost(now_s=5) == "rank 1 (a) failed: ZeroDivisionError: x"


def test_of_a_stuck_run_those_that_others_wait_for_come_first(roster: Roster) -> None:
    for rank in (0, 1, 3):
        roster.hear(rank, {"beat": ["waiting for the others", 8, 600.0]}, now_s=600)
    roster.hear(2, {"beat": ["reading data", 8, 600.0]}, now_s=600)
    assert roster.describe_stuck(for_s=600) == (
        "no progress for 600 s: rank 2 (node1) reading data, step 8; "
        "rank 0 (node0), rank 1 (node0), rank 3 (node1) waiting for the others, step 8"
    )


def test_a_pulse_is_stuck_after_its_time() -> None:
    pulse = Pulse()
    assert not pulse.is_stuck(10)
    pulse.enter("saving the state", step=3, patience=3)
    assert pulse.is_stuck(0)
    assert str(pulse.read()) == "saving the state, step 3"
    assert str(Report("starting", None, 0)) == "starting"


@pytest.fixture
def pair() -> Iterator[tuple[Line, Line]]:
    desk = open_desk()
    line = call_desk(["127.0.0.1"], port=desk.getsockname()[1])
    assert line is not None
    other = Line(desk.accept()[0])
    yield line, other
    for end in (line, other, desk):
        end.close()


def test_messages_arrive_whole_and_the_end_is_seen(pair: tuple[Line, Line]) -> None:
    line, other = pair
    line.send({"beat": ["x", 1, 0.5]})
    line.socket.sendall(b'{"bye": ')
    assert other.receive() == [{"beat": ["x", 1, 0.5]}]
    line.socket.sendall(b"true}\n")
    assert other.receive() == [{"bye": True}]
    line.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert other.receive() is None  # a stranger
    line.close()
    assert other.receive() is None


def test_rank_0_is_found_under_its_own_names_too() -> None:
    names = find_addresses("127.0.0.1")
    assert names[0] == "127.0.0.1"
    assert socket.gethostname() in names
    assert call_desk(["127.0.0.1"], port=9, timeout_s=1) is None
