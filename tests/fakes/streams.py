"""Streams and events of a GPU that is not there, which find work that is not ordered: races.

Each stream numbers its work and knows up to which number of every other stream it has waited. A kernel that
touches what another stream wrote must come after it; memory that is freed goes back to the stream that it was
allocated on, whose next allocation must come after all that others did to it, unless they were told of by
`record_stream`. Source: torch's CUDA semantics, and its caching allocator.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


class RaceError(AssertionError):
    """Work on two streams that nothing puts in order."""


class FakeStream:
    """As much of torch.cuda.Stream as training asks for."""

    def __init__(self, streams: "Streams", name: str) -> None:
        self.streams, self.name = streams, name
        self.known: dict[FakeStream, int] = {self: 0}  # own work so far, and that of others it has waited for
        self.freed: list[Block] = []  # memory that its next allocation may get

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        """An event of all work so far."""
        event = FakeEvent(self.streams) if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "FakeEvent") -> None:
        """All later work comes after the event's."""
        _merge(self.known, event.known)

    def wait_stream(self, stream: "FakeStream") -> None:
        """All later work comes after all so far of another stream."""
        self.wait_event(stream.record_event())

    def synchronize(self) -> None:
        """The host waits."""
        self.streams.join(self.known)
        self.streams.wait("synchronize")

    def query(self) -> bool:
        """Whether all is done."""
        return False


class FakeEvent:
    """As much of torch.cuda.Event as training asks for."""

    def __init__(self, streams: "Streams", **kwargs: Any) -> None:
        self.streams = streams
        self.known: dict[FakeStream, int] = {}

    def record(self, stream: FakeStream | None = None) -> None:
        """Mark what the stream has to do so far."""
        self.known = dict((stream or self.streams.current).known)

    def wait(self, stream: FakeStream | None = None) -> None:
        """Have the stream's later work come after this."""
        (stream or self.streams.current).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        self.streams.join(self.known)
        self.streams.wait("event")

    def query(self) -> bool:
        """Whether it has come."""
        return False

    def elapsed_time(self, end: "FakeEvent") -> float:
        """Milliseconds."""
        return 1.0


@dataclass
class Block:
    """Memory of a tensor and its views."""

    name: str
    owner: FakeStream
    written: tuple[FakeStream, int]
    used: dict[FakeStream, int] = field(default_factory=dict)  # the last work of each stream on it
    recorded: set[FakeStream] = field(default_factory=set)


class Streams:
    """All streams of a device; `wait` is called where the host waits for them."""

    def __init__(self, wait: Callable[[str], None]) -> None:
        self.wait = wait
        self.default = self.current = FakeStream(self, "the default stream")
        self.network = FakeStream(self, "the collectives' stream")
        self._all = [self.default, self.network]
        self._host: dict[FakeStream, int] = {}  # work that the host has waited for
        self._blocks: dict[int, Block] = {}
        self._watched: dict[int, Any] = {}

    def answers(self) -> dict[str, Any]:
        """What to put in the place of torch's own, by name."""
        return {
            "torch.cuda.Stream": self.make,
            "torch.cuda.Event": lambda *args, **kwargs: FakeEvent(self, **kwargs),
            "torch.cuda.current_stream": lambda *args: self.current,
            "torch.cuda.default_stream": lambda *args: self.default,
            "torch.cuda.stream": self.use,
            "torch.cuda.set_stream": self.set_current,
            "torch.cuda.synchronize": self.synchronize,
            "torch._C._distributed_c10d.FakeWork.wait": lambda *args: self.current.wait_stream(self.network),
            "torch.Tensor.record_stream": lambda tensor, stream: self.record(tensor, stream),
        }

    def make(self, *args: Any, **kwargs: Any) -> FakeStream:
        """A new stream."""
        self._all.append(FakeStream(self, f"stream {len(self._all)}"))
        return self._all[-1]

    def set_current(self, stream: FakeStream) -> None:
        """Work goes to `stream` from here on."""
        self.current = stream

    def synchronize(self, *args: Any) -> None:
        """The host waits for all streams."""
        for stream in self._all:
            self.join(stream.known)
        self.wait("synchronize")

    def join(self, known: dict[FakeStream, int]) -> None:
        """The host has waited for this: all work that it gives from now on comes after."""
        _merge(self._host, known)

    @contextmanager
    def use(self, stream: FakeStream | None) -> Iterator[None]:
        """Work goes to `stream`."""
        if stream is None:
            yield
            return
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def record(self, tensor: Tensor, stream: FakeStream) -> None:
        """`tensor.record_stream(stream)`: its memory is not given away before that stream's work is done."""
        if block := self._blocks.get(_place(tensor)):
            block.recorded.add(stream)

    def send(self, tensors: Sequence[Tensor], written: Sequence[Tensor], *, is_async: bool) -> None:
        """A collective: on a stream of its own, after the current one's work; it keeps its tensors."""
        self.network.wait_stream(self.current)
        for tensor in tensors:
            self.record(tensor, self.network)
        with self.use(self.network):
            self.network.known[self.network] += 1
            _merge(self.network.known, self._host)
            self._touch(tensors, written, "a collective")
        if not is_async:
            self.current.wait_stream(self.network)

    @contextmanager
    def enqueue(self, func: Any, inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Work of the current stream: it reads or writes `inputs` and makes what fills the list."""
        made: list[Tensor] = []
        yield made
        inputs = [tensor for tensor in inputs if _is_watched(tensor)]
        places = {_place(tensor) for tensor in inputs}
        new = [tensor for tensor in made if _is_watched(tensor) and _place(tensor) not in places]
        is_view = bool(made) and not new and not func._schema.is_mutable
        if is_view or func.namespace == "c10d":  # no kernel; see `send`
            return
        stream, name = self.current, func.name().removeprefix("aten::")
        stream.known[stream] += 1
        _merge(stream.known, self._host)
        for tensor in new:
            self._allocate(tensor, name)
        self._touch(inputs, _list_written(func, inputs, made), name)

    def _touch(self, inputs: Sequence[Tensor], written: Sequence[Tensor], name: str) -> None:
        """The current stream's newest work reads `inputs` and writes some of them."""
        stream = self.current
        for tensor in inputs:
            if block := self._blocks.get(_place(tensor)):
                self._check_use(block, name)
                block.used[stream] = stream.known[stream]
        for tensor in written:
            if block := self._blocks.get(_place(tensor)):
                self._check_order(block, block.used, f"{name} writes what another stream may still read")
                block.written = (stream, stream.known[stream])

    def _allocate(self, tensor: Tensor, name: str) -> None:
        stream, place = self.current, _place(tensor)
        if place in self._blocks:
            return
        for block in stream.freed:
            self._check_order(
                block,
                {user: number for user, number in block.used.items() if user not in block.recorded},
                f"memory of {block.name}, freed, is given to {name} while another stream may use it",
            )
        stream.freed = []
        now = stream.known[stream]
        block = Block(name, stream, (stream, now), {stream: now})
        self._blocks[place] = block
        self._watched[place] = weakref.ref(tensor.untyped_storage(), lambda _: self._free(place))

    def _free(self, place: int) -> None:
        self._watched.pop(place, None)
        if block := self._blocks.pop(place, None):
            block.owner.freed.append(block)

    def _check_use(self, block: Block, name: str) -> None:
        writer, number = block.written
        self._check_order(block, {writer: number}, f"{name} uses what {block.name} may not have written yet")

    def _check_order(self, block: Block, done: dict[FakeStream, int], fault: str) -> None:
        for other, number in done.items():
            if self.current.known.get(other, 0) < number:
                raise RaceError(f"{fault} ({self.current.name} has not waited for {other.name})")


def _merge(known: dict[FakeStream, int], more: dict[FakeStream, int]) -> None:
    for stream, number in more.items():
        known[stream] = max(known.get(stream, 0), number)


def _is_watched(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _list_written(func: Any, inputs: Sequence[Tensor], made: Sequence[Tensor]) -> list[Tensor]:
    """The inputs that an in-place operation, or one with `out`, gives back."""
    if not func._schema.is_mutable:
        return []
    if not made:  # foreach: it gives nothing back; its first list is what it changes
        return [*inputs]
    places = {_place(tensor) for tensor in inputs}
    return [tensor for tensor in made if _is_watched(tensor) and _place(tensor) in places]
