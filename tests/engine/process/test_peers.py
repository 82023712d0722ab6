"""What rank 0 concludes from what it receives, and the lines it receives it on."""

import socket
from collections.abc import Iterator

import pytest

from cmae_scale.engine.process.heartbeat import Heartbeat, Report
from cmae_scale.engine.process.peers import (
    Connection,
    PeerTable,
    connect_to_server,
    find_addresses,
    open_server,
)


@pytest.fixture
def peers() -> PeerTable:
    """Ranks 0 to 3 on two machines, all heard at second 0."""
    peers = PeerTable(peer_timeout_s=30)
    for rank in range(4):
        peers.receive(rank, {"host": f"node{rank // 2}", "beat": ["computing gradients", 7, 1.0]}, now_s=0)
    return peers


def test_a_line_that_breaks_names_rank_machine_and_place(peers: PeerTable) -> None:
    finding = peers.lose(3)
    assert finding is not None
    assert finding.startswith("rank 3 (node1) died while computing gradients, step 7")
    peers.receive(2, {"bye": True}, now_s=1)
    assert peers.lose(2) is None


def test_silence_is_warned_of_once_and_then_ends_the_run(peers: PeerTable) -> None:
    for rank in (0, 1, 3):
        peers.receive(rank, {"beat": ["computing gradients", 8, 0.0]}, now_s=11)
    assert peers.find_lost(now_s=11) is None
    assert peers.find_silent(now_s=11) == ["warning: rank 2 (node1) has shown no life for 11 s"]
    assert peers.find_silent(now_s=12) == []
    for rank in (0, 1, 3):
        peers.receive(rank, {"beat": ["waiting for the others", 8, 0.0]}, now_s=31)
    finding = peers.find_lost(now_s=31)
    assert finding is not None
    assert finding.startswith(
        "rank 2 (node1) has shown no life for 31 s, last seen computing gradients, step 7"
    )


def test_who_was_silent_and_comes_back_is_forgiven(peers: PeerTable) -> None:
    peers.find_silent(now_s=20)
    for rank in range(4):
        peers.receive(rank, {"beat": ["computing gradients", 8, 0.0]}, now_s=25)
    assert peers.find_silent(now_s=26) == []
    assert peers.find_lost(now_s=40) is None


def test_when_rank_0_was_suspended_nobody_else_is_to_blame(peers: PeerTable) -> None:
    peers.reset(now_s=1000)
    assert peers.find_lost(now_s=1001) is None


def test_an_error_of_one_rank_is_told_at_once_and_a_shared_one_after_a_while(peers: PeerTable) -> None:
    peers.receive(1, {"failed": "DataError: cut", "shared": True}, now_s=5)
    assert peers.find_lost(now_s=6) is None
    assert peers.find_lost(now_s=5 + PeerTable.GRACE_S) == "rank 1 (node0) failed: DataError: cut"
    for rank in (0, 2, 3):
        peers.receive(rank, {"failed": "the same", "shared": True}, now_s=6)
    assert peers.find_lost(now_s=20) is None  # all ended by themselves
    other = PeerTable(peer_timeout_s=30)
    for rank in range(2):
        other.receive(rank, {"host": "a"}, now_s=0)
    other.receive(1, {"failed": "ZeroDivisionError: x", "shared": False}, now_s=5)
    assert other.find_lost(now_s=5) == "rank 1 (a) failed: ZeroDivisionError: x"


def test_of_a_stuck_run_those_that_others_wait_for_come_first(peers: PeerTable) -> None:
    for rank in (0, 1, 3):
        peers.receive(rank, {"beat": ["waiting for the others", 8, 600.0]}, now_s=600)
    peers.receive(2, {"beat": ["reading data", 8, 600.0]}, now_s=600)
    assert peers.describe_stuck(for_s=600) == (
        "no progress for 600 s: rank 2 (node1) reading data, step 8; "
        "rank 0 (node0), rank 1 (node0), rank 3 (node1) waiting for the others, step 8"
    )


def test_a_pulse_is_stuck_after_its_time() -> None:
    heartbeat = Heartbeat()
    assert not heartbeat.is_stuck(10)
    heartbeat.enter("saving a checkpoint", step=3, patience=3)
    assert heartbeat.is_stuck(0)
    assert str(heartbeat.read()) == "saving a checkpoint, step 3"
    assert str(Report("starting", None, 0)) == "starting"


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    desk = open_server()
    line = connect_to_server(["127.0.0.1"], port=desk.getsockname()[1])
    assert line is not None
    other = Connection(desk.accept()[0])
    yield line, other
    for end in (line, other, desk):
        end.close()


def test_messages_arrive_whole_and_the_end_is_seen(pair: tuple[Connection, Connection]) -> None:
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
    assert connect_to_server(["127.0.0.1"], port=9, timeout_s=1) is None
