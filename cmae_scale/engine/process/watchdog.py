"""The thread beside training on every rank that knows when it cannot go on, and then ends it with a reason.

Main threads wait for one another in C++, where no Python can reach them. This thread learns of signals from
the wake-up file of the C handler, of lost and frozen ranks from rank 0 (see peers.py), and sees when nothing
moves; it then writes the stacks of all threads, says which rank it is about, and ends the process.
"""

import faulthandler
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cmae_scale.config.cmae import FaultsConfig
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.credentials import mask
from cmae_scale.core.terminal import tell
from cmae_scale.core.world import World
from cmae_scale.engine.process.heartbeat import Heartbeat
from cmae_scale.engine.process.peers import (
    Connection,
    Message,
    PeerTable,
    connect_to_server,
    find_addresses,
    open_server,
)
from cmae_scale.engine.process.signals import SIGNALS, STOP_FILE, StopRequest

FAILED = 1  # exit status of a run that the watch ends
# One request may arrive as several signals: the deepspeed launcher passes a Ctrl-C on as SIGTERM, twice, and
# torchrun as a second SIGINT. So a rank leaves at once only when asked again after a while.
PATIENCE_S = 5.0


class Finding(NamedTuple):
    """Why no rank can go on. `with_stacks`: nobody is dead, so the stacks tell more."""

    text: str
    with_stacks: bool = False
    is_about_first: bool = False  # rank 0 is lost, so that another must speak


class Watchdog:
    """Use it in a `with`, on all ranks together. `on_end` is told why, before the process ends."""

    def __init__(
        self,
        *,
        world: World,
        heartbeat: Heartbeat,
        stop: StopRequest,
        faults: FaultsConfig,
        kind: str = "cmae",
        out: Path,
        on_end: Callable[[str], None],
    ) -> None:
        self._world, self._heartbeat, self._stop, self._faults = world, heartbeat, stop, faults
        self._stacks, self._stop_file = out / "stacks", out / "stop"
        self._kind, self._on_end = kind, on_end
        self._every_s = min(2.0, faults.peer_timeout_s / 10, faults.step_timeout_s / 10)
        self._selector = selectors.DefaultSelector()
        self._line: Connection | None = None  # to rank 0
        self._desk: socket.socket | None = None  # of rank 0
        self._lines: dict[Connection, int | None] = {}  # of rank 0: to whom, once it has said so
        self._peers = PeerTable(faults.peer_timeout_s)
        self._token = ""
        self._heard_s = time.monotonic()
        self._request: str | None = None  # seen by this thread, maybe before the main thread could
        self._asked_s: float | None = None  # when this process itself was
        self._has_passed_on = False
        self._is_ending = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._meet()
        self._reader, self._waker = socket.socketpair()
        for end in (self._reader, self._waker):
            end.setblocking(False)
        self._selector.register(self._reader, selectors.EVENT_READ)
        self._old_wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Tell the others that this rank ends, and how, and wait for those who end alike."""
        if self._line is not None:
            self._line.send({"bye": True})
        if self._world.is_first and self._is_ending:
            self._wait_for_others()
        self._closing.set()
        signal.set_wakeup_fd(self._old_wakeup)
        self._waker.send(b"\0")
        self._thread.join()
        for line in (self._line, *self._lines):
            if line is not None:
                line.close()
        for end in (self._reader, self._waker, self._desk):
            if end is not None:
                end.close()
        self._selector.close()

    def report(self, text: str, *, is_shared: bool) -> None:
        """Tell rank 0 that this rank ends by an error; `is_shared` when others may end by the same one."""
        self._is_ending = True
        if self._line is not None:
            self._line.send({"failed": mask(text), "shared": is_shared})

    def await_verdict(self) -> None:
        """After an error of the connections between ranks: if a rank is lost, the process ends in here."""
        self._closing.wait(PeerTable.GRACE_S + 3 * self._every_s)

    def _meet(self) -> None:
        """Connect every rank with rank 0."""
        if self._world.size == 1:
            return
        told: tuple[list[str], int, str] = ([], 0, "")
        if self._world.is_first:
            self._desk = open_server()
            self._token = secrets.token_hex(16)  # a stranger's connection is no rank's
            addresses = find_addresses(os.environ.get("MASTER_ADDR", "127.0.0.1"))
            told = (addresses, self._desk.getsockname()[1], self._token)
            self._selector.register(self._desk, selectors.EVENT_READ)
        addresses, port, token = gather_objects(told)[0]
        self._line = connect_to_server(["127.0.0.1"] if self._world.is_first else addresses, port=port)
        if self._line is None:
            tell(
                f"warning: rank {self._world.rank} cannot reach rank 0 at {addresses}, port {port}, "
                "so nobody will tell when it dies",
                to=sys.stderr,
            )
            return
        self._line.send({"rank": self._world.rank, "token": token, "host": socket.gethostname()})
        self._selector.register(self._line.socket, selectors.EVENT_READ, self._line)

    def _run(self) -> None:
        last_s, beaten_s = time.monotonic(), 0.0
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._every_s / 2):
                if key.fileobj is self._reader:
                    self._notice(self._reader.recv(4096))
                elif key.fileobj is self._desk:
                    self._accept()
                else:
                    self._listen(key.data)
            now_s = time.monotonic()
            if now_s - last_s > 3 * self._every_s:  # this thread itself was held up: nobody else is to blame
                self._heard_s = now_s
                self._peers.reset(now_s=now_s)
                self._heartbeat.reset(now_s - last_s)
            last_s = now_s
            self._pass_on()
            if now_s - beaten_s > self._every_s:
                beaten_s = now_s
                self._beat()
            self._check(now_s)
        self._tell_pending()

    def _accept(self) -> None:
        assert self._desk is not None
        line = Connection(self._desk.accept()[0])
        self._lines[line] = None
        self._selector.register(line.socket, selectors.EVENT_READ, line)

    def _listen(self, line: Connection) -> None:
        messages = line.receive()
        if line is self._line:
            self._obey(messages)
            return
        rank = self._lines[line]
        for message in messages or []:
            if rank is None and message.get("token") == self._token:
                rank = self._lines[line] = int(message["rank"])
            if rank is None:
                messages = None
                break
            self._peers.receive(rank, message, now_s=time.monotonic())
            if "asked" in message:
                self._send_all(message)
        if messages is None:
            self._selector.unregister(line.socket)
            line.close()
            del self._lines[line]
            if rank is not None and (lost := self._peers.lose(rank)):
                self._end_all(Finding(lost))

    def _obey(self, messages: list[Message] | None) -> None:
        """What rank 0 says."""
        self._heard_s = time.monotonic()
        if messages is None:
            self._drop_line()
            self._end(Finding("rank 0 died (its log says more)", is_about_first=True))
        for message in messages or []:
            if "asked" in message:
                self._request, self._has_passed_on = message["asked"], True
                self._stop.tell(message["asked"])
            if "finding" in message:
                self._end(Finding(message["finding"], message["stacks"]))
            if message.get("bye"):
                self._drop_line()

    def _drop_line(self) -> None:
        if self._line is not None:
            self._selector.unregister(self._line.socket)
            self._line.close()
            self._line = None

    def _notice(self, numbers: bytes) -> None:
        """Signals of this process, as the C handler wrote them down."""
        now_s = time.monotonic()
        for number in SIGNALS:
            if number not in numbers:
                continue
            if self._asked_s is None:
                self._request, self._asked_s = self._request or number.name, now_s
            elif now_s - self._asked_s > PATIENCE_S:
                tell(f"asked to leave again ({number.name}): leaving at once", to=sys.stderr)
                os._exit(128 + number)

    def _pass_on(self) -> None:
        """A request to leave, to all ranks at once: main threads may be waiting for one another."""
        if self._world.is_first and self._request is None and self._stop_file.is_file():
            with suppress(OSError):  # then the next run is asked to leave too
                self._stop_file.unlink(missing_ok=True)
            self._request = STOP_FILE
            self._stop.tell(STOP_FILE)
        if self._request is not None and not self._has_passed_on:
            self._has_passed_on = True
            if self._line is not None:
                self._line.send({"asked": self._request})

    def _beat(self) -> None:
        if self._line is not None:
            self._line.send({"beat": list(self._heartbeat.read())})
        if self._desk is not None:
            self._send_all({"beat": True})

    def _check(self, now_s: float) -> None:
        if self._world.is_first:
            for warning in self._peers.find_silent(now_s=now_s):
                tell(warning, to=sys.stderr)
            if lost := self._peers.find_lost(now_s=now_s):
                self._end_all(Finding(lost))
            # ranks go in step, so what holds up any of them holds up this one
            if self._heartbeat.is_stuck(self._faults.step_timeout_s):
                self._end_all(Finding(self._describe_stuck(), True))
        elif self._line is not None and now_s - self._heard_s > self._faults.peer_timeout_s:
            text = f"rank 0 has shown no life for {now_s - self._heard_s:.0f} s"
            self._end(Finding(text, is_about_first=True))

    def _describe_stuck(self) -> str:
        report = self._heartbeat.read()
        if self._world.size == 1:
            self._peers.receive(0, {"host": socket.gethostname(), "beat": list(report)}, now_s=0)
        return (
            f"{self._peers.describe_stuck(for_s=report.for_s)}; the stacks of all threads are in "
            f"{self._stacks}. Longer steps need a larger {self._kind}.faults.step_timeout_s"
        )

    def _send_all(self, message: Message) -> None:
        for line, rank in self._lines.items():
            if rank is not None:
                line.send(message)

    def _end_all(self, finding: Finding) -> None:
        self._send_all({"finding": finding.text, "stacks": finding.with_stacks})
        self._end(finding)

    def _end(self, finding: Finding) -> None:
        """End this process. Its main thread cannot: it may be waiting for a rank that is gone."""
        if self._closing.is_set() or self._is_ending:
            return
        if (
            self._world.local_rank == 0 or self._world.rank == 1
        ):  # one voice per machine, and one beside rank 0
            tell(f"error: rank {self._world.rank} ends: {finding.text}", to=sys.stderr)
        _try(lambda: self._leave_word(finding))
        os._exit(FAILED)

    def _leave_word(self, finding: Finding) -> None:
        if finding.with_stacks:
            self._write_stacks(finding)
        if self._world.is_first or (finding.is_about_first and self._world.rank == 1):
            self._on_end(finding.text)
        sys.stdout.flush()

    def _write_stacks(self, finding: Finding) -> None:
        path = self._stacks / f"rank_{self._world.rank}.txt"
        try:
            self._stacks.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"{finding.text}\nthis rank: {self._heartbeat.read()}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _wait_for_others(self) -> None:
        """Until every rank has called and ended, a while at most: one may have yet to say who it is."""
        deadline_s = time.monotonic() + PeerTable.GRACE_S
        while self._desk is not None and time.monotonic() < deadline_s:
            if len(self._peers.members) == self._world.size and not self._peers.unfinished():
                break
            time.sleep(0.05)

    def _tell_pending(self) -> None:
        """The last word of rank 0: whoever goes on now does so unwatched, unless rank 0 failed."""
        if self._desk is None:
            return
        own = self._peers.members.get(0)
        if own is not None and own.failed is not None and self._peers.unfinished():
            self._send_all({"finding": f"rank 0 failed: {own.failed}", "stacks": False})
        else:
            self._send_all({"bye": True})


def _try(work: Callable[[], None], *, timeout_s: float = 5.0) -> None:
    """Give `work` some time: the disk may be what all are waiting for."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
