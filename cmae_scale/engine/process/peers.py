"""The line that every rank keeps to rank 0: who is there, what it is doing, and who is gone.

The kernel closes a line when its process dies, however it dies, so that a death is known at once; a process
that is frozen keeps its line but sends nothing. Training's own connections cannot tell: NCCL waits for a dead
peer until its timeout, gloo fails with an address. One small JSON object per line of text.
"""

import json
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from cmae_scale.core.strict_json import parse_line
from cmae_scale.engine.process.heartbeat import PARTS, Report

Message = dict[str, Any]


class Connection:
    """One end of a connection. Nothing here waits for the other side."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(1.0)  # of a send into a full buffer, whose reader is frozen
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._rest = b""

    def send(self, message: Message) -> None:
        """Hand a message to the kernel. An error shows at the next `receive`."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Whole messages that are there; None when the other side is gone. Call it when it is readable."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        messages = [message for text in whole if (message := parse_line(text)) is not None]
        return messages if len(messages) == len(whole) else None  # no rank of ours

    def close(self) -> None:
        """Let go of the connection."""
        self.socket.close()


@dataclass
class Member:
    """A rank as rank 0 knows it. `failed` is what it said when it ended by an error of its own."""

    host: str
    heard_s: float
    report: Report = field(default_factory=lambda: Report("starting", None, 0.0))
    failed: str | None = None
    failed_s: float = 0.0
    is_shared: bool = False  # others may end by the same error
    is_done: bool = False


@dataclass
class PeerTable:
    """What rank 0 knows of the ranks. Pure: time comes in as an argument.

    A rank that failed with an error that all ranks may share (bad data, a wrong setting) gives the others
    `GRACE_S` to come to the same end by themselves.
    """

    peer_timeout_s: float
    members: dict[int, Member] = field(default_factory=dict)
    warned: set[int] = field(default_factory=set)

    GRACE_S = 5.0

    def receive(self, rank: int, message: Message, *, now_s: float) -> None:
        """Take note of a message of `rank`."""
        member = self.members.setdefault(rank, Member(message.get("host", "?"), now_s))
        member.heard_s = now_s
        if "beat" in message:
            member.report = Report(*message["beat"])
        if "failed" in message:
            member.failed, member.failed_s = message["failed"], now_s
            member.is_done, member.is_shared = True, bool(message["shared"])
        if message.get("bye"):
            member.is_done = True

    def reset(self, *, now_s: float) -> None:
        """Start all clocks anew: it was rank 0 that did not listen."""
        for member in self.members.values():
            member.heard_s = now_s

    def lose(self, rank: int) -> str | None:
        """The finding when the line of `rank` broke; None when it had said that it would end."""
        member = self.members.get(rank)
        if member is None or member.is_done:
            return None
        return (
            f"{self._name(rank)} died while {member.report}: killed from outside (kill -9, out of memory, a "
            "node that failed) or crashed; its own log says more"
        )

    def find_lost(self, *, now_s: float) -> str | None:
        """The finding on ranks that failed while others go on, or that have been silent for too long.

        What befalls rank 0 itself it tells at its end.
        """
        for rank, member in self.members.items():
            if rank and member.failed is not None and self.unfinished():
                if now_s - member.failed_s >= (self.GRACE_S if member.is_shared else 0):
                    return f"{self._name(rank)} failed: {member.failed}"
            elif not member.is_done and now_s - member.heard_s > self.peer_timeout_s:
                return (
                    f"{self._name(rank)} has shown no life for {now_s - member.heard_s:.0f} s, last seen "
                    f"{member.report}: its process is frozen or its machine cannot be reached"
                )
        return None

    def find_silent(self, *, now_s: float) -> list[str]:
        """A warning for each rank that has become silent for a third of the time it may be."""
        silent = {
            rank
            for rank, member in self.members.items()
            if not member.is_done and now_s - member.heard_s > self.peer_timeout_s / 3
        }
        new, self.warned = silent - self.warned, silent
        return [
            f"warning: {self._name(rank)} has shown no life for {now_s - self.members[rank].heard_s:.0f} s"
            for rank in sorted(new)
        ]

    def unfinished(self) -> list[int]:
        """Ranks that have not said that they end."""
        return [rank for rank, member in self.members.items() if not member.is_done]

    def describe_stuck(self, *, for_s: float) -> str:
        """The finding when nothing moves any more: who does what, those that others wait for first."""
        groups: dict[tuple[str, int | None], list[int]] = {}
        for rank, member in sorted(self.members.items()):
            groups.setdefault(member.report[:2], []).append(rank)
        told = "; ".join(
            f"{self._names(groups[place])} {Report(*place, 0.0)}"
            for place in sorted(groups, key=lambda place: order_of(*place))
        )
        return f"no progress for {for_s:.0f} s: {told}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self.members[rank].host})"

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in ranks)


def order_of(where: str, step: int | None) -> tuple[int, int]:
    """How far a rank is that does `where` at `step`: what others wait for comes first.

    A rank that waits for the others comes after those that compute, for it has said that it is ready.
    """
    return (-1 if step is None else step), PARTS.index(where) if where in PARTS else len(PARTS)


def open_server() -> socket.socket:
    """Where rank 0 takes the lines of all ranks, at a port of the kernel's choice."""
    return socket.create_server(("", 0), backlog=4096)


def find_addresses(master: str) -> list[str]:
    """Names under which other machines may find this one: rank 0 is not always at MASTER_ADDR."""
    source = find_source(master)
    addresses = [master, *([] if source is None else [source]), socket.gethostname()]
    return list(dict.fromkeys(addresses))


def find_source(goal: str) -> str | None:
    """This machine's own address on the way to `goal`; None where there is no way."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((goal, 9))  # sends nothing: the kernel says which way it would go
        address: str = probe.getsockname()[0]
        return address
    return None


def connect_to_server(addresses: Iterable[str], *, port: int, timeout_s: float = 10.0) -> Connection | None:
    """A line to rank 0, or None when none of its names can be reached."""
    for address in addresses:
        try:
            return Connection(socket.create_connection((address, port), timeout=timeout_s))
        except OSError:
            continue
    return None
