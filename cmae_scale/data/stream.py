"""Batches of decoded master images in the plan's order, made by threads ahead of whoever consumes them.

One thread reads shards and says which sample belongs in which row; `workers` threads decode, crop and write
it to the row's slot in a batch that was allocated beforehand. Decoders and file reads leave the interpreter
lock, so threads are enough, and no image travels between processes. No value depends on timing.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.blocks import RawBatch, RawRow, read_raw_batches
from cmae_scale.data.decoding import BadSamples, Decoding, Pixels, PretrainCrops, SampleSlot, allocate_for
from cmae_scale.data.mix import MixPlan
from cmae_scale.data.shard_set import ShardSet

NO_LABEL = -1
CLOSE_S = 3.0  # how long to wait for a thread that should end: a preempted run has 30 s in all
PIECES = 4  # that a batch is dealt to each decoder in: few hand-overs, and no long wait for the last one


@dataclass(frozen=True)
class CropBatch:
    """One micro-batch of a rank: rows of the global batch of `step`, in their order.

    `crops` is 1, or 2 when the target view is cut independently. The channels of `images` lie last in memory.
    `labels` are NO_LABEL where the shards have none, `keys` are "shard/key".
    """

    images: UInt8[Tensor, "batch crops 3 side side"]
    labels: Int64[Tensor, " batch"]
    keys: tuple[str, ...]
    step: int
    micro: int


class DecodedRow(NamedTuple):
    """What one row of a batch holds beside its crops."""

    label: int
    key: str


def open_batches(
    shards: ShardSet,
    plan: MixPlan,
    *,
    views: ViewsConfig,
    data: DataConfig,
    rank: int,
    ranks: int,
    accumulation: int,
    first_step: int,
    end_step: int,
    pin: bool,
    bad: BadSamples,
) -> "BatchStream":
    """All micro-batches of this rank for steps `first_step` to `end_step`, `accumulation` of them per step.

    What they hold depends on the plan alone: workers, ranks and where it begins change nothing. A damaged
    shard raises DataError once all batches that came before the damage are consumed. An image that cannot be
    decoded is noted in `bad`, and another of its shuffle block stands in for it. `pin` allocates page-locked
    memory, for copies to a GPU.
    """
    decoding = PretrainCrops(views, data.max_image_mpx)
    return open_stream(
        shards,
        plan,
        decoding=decoding,
        data=data,
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
        first_step=first_step,
        end_step=end_step,
        pin=pin,
        bad=bad,
    )


def open_stream(
    shards: ShardSet,
    plan: MixPlan,
    *,
    decoding: Decoding,
    data: DataConfig,
    rank: int,
    ranks: int,
    accumulation: int,
    first_step: int,
    end_step: int,
    pin: bool,
    bad: BadSamples,
) -> "BatchStream":
    """As `open_batches`, with whatever `decoding` makes of an image."""
    stop = threading.Event()
    raw_batches = read_raw_batches(
        shards,
        plan,
        rank=rank,
        ranks=ranks,
        accumulation=accumulation,
        steps=range(first_step, end_step),
        stop=stop,
    )

    def decode(row: RawRow, out: Pixels) -> DecodedRow:
        return decode_row(row, plan, decoding=decoding, bad=bad, out=out)

    return BatchStream(
        raw_batches,
        decode,
        allocate=allocate_for(decoding, pin=pin),
        workers=data.workers,
        ahead=data.count_ahead(accumulation),
        stop=stop,
    )


def decode_row(
    row: RawRow,
    plan: MixPlan,
    *,
    decoding: Decoding,
    bad: BadSamples,
    out: Pixels,
) -> DecodedRow:
    """Write the pictures of the row's sample, or of the first of its block that can be decoded, to `out`.

    Random numbers are drawn per epoch and sample, so they do not depend on the row either. DataError if no
    sample of the block is readable.
    """
    for attempt, sample in enumerate(row.block.candidates(row.slot, distance=plan.stream_rows)):
        try:
            slot = SampleSlot(plan.seed, row.block.epoch, sample.number)
            decoding.decode(sample.image, slot, out=out, grey_range=sample.grey_range)
        except DataError as error:
            if attempt == 0:  # a stand-in that is bad too is counted where it is due itself
                bad.add(sample.key, str(error))
            continue
        return DecodedRow(NO_LABEL if sample.label is None else sample.label, sample.key)
    raise DataError(
        f"no image of a whole shuffle block can be decoded, {row.block.samples[0].key} to "
        f"{row.block.samples[-1].key}: run data_prep/check_shards.py"
    )


class BatchStream:
    """Iterator of CropBatch over running threads. Close it, or use it in a `with`, so that they end."""

    def __init__(
        self,
        raw_batches: Iterator[RawBatch],
        decode: Callable[[RawRow, Pixels], DecodedRow],
        *,
        allocate: Callable[[int], Tensor],
        workers: int,
        ahead: int,
        stop: threading.Event,
    ) -> None:
        self._raw_batches = raw_batches
        self._decode = decode
        self._allocate = allocate
        self._stop = stop
        self._room = threading.Semaphore(ahead)
        self._begun: SimpleQueue[_Filling | BaseException | None] = SimpleQueue()  # None: no more will come
        self._jobs: SimpleQueue[tuple[_Filling, range] | None] = SimpleQueue()  # None: a decoder may go home
        self._reader = threading.Thread(target=self._read, name="data reader", daemon=True)
        self._decoders = [
            threading.Thread(target=self._work, name=f"data decoder {number}", daemon=True)
            for number in range(workers)
        ]
        for thread in (self._reader, *self._decoders):
            thread.start()

    def __iter__(self) -> Iterator[CropBatch]:
        return self

    def __next__(self) -> CropBatch:
        """The next micro-batch. An error of any thread is raised here, at the batch that it concerns."""
        if self._stop.is_set():
            raise StopIteration
        try:
            filling = self._begun.get()
            if filling is None:
                raise StopIteration
            if isinstance(filling, BaseException):
                raise filling
            batch = filling.wait()
        except BaseException:
            self.close()
            raise
        self._room.release()
        return batch

    def close(self) -> None:
        """End all threads; images being decoded are finished, batches not consumed are dropped.

        A reader that is stuck in a read (a store that does not answer) is left behind: it ends after it.
        """
        self._stop.set()
        self._room.release()
        self._reader.join(CLOSE_S)
        for _ in self._decoders:
            self._jobs.put(None)
        for thread in self._decoders:
            thread.join(CLOSE_S)

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        try:
            for raw in self._raw_batches:
                self._room.acquire()
                if self._stop.is_set():
                    return
                filling = _Filling(raw, self._allocate(len(raw.rows)))
                self._begun.put(filling)
                size = max(1, len(raw.rows) // (PIECES * len(self._decoders)))
                for first in range(0, len(raw.rows), size):
                    self._jobs.put((filling, range(first, min(first + size, len(raw.rows)))))
            self._begun.put(None)
        except BaseException as error:
            self._begun.put(error)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            filling, rows = job
            try:
                for row in rows:
                    if self._stop.is_set():
                        break
                    filling.put(row, self._decode(filling.raw.rows[row], filling.pixels[row]))
            except BaseException as error:
                filling.fail(error)


class _Filling:
    """A micro-batch whose rows arrive from several threads in any order."""

    def __init__(self, raw: RawBatch, images: Tensor) -> None:
        self.raw = raw
        self.images = images
        self.pixels = images.permute(0, 1, 3, 4, 2).numpy()  # the same memory
        self._labels = np.full(len(raw.rows), NO_LABEL, dtype=np.int64)
        self._keys = [""] * len(raw.rows)
        self._missing = len(raw.rows)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()

    def put(self, row: int, decoded: DecodedRow) -> None:
        self._labels[row] = decoded.label
        self._keys[row] = decoded.key
        with self._lock:
            self._missing -= 1
            if self._missing == 0:
                self._done.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._done.set()

    def wait(self) -> CropBatch:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return CropBatch(
            self.images, torch.from_numpy(self._labels), tuple(self._keys), self.raw.step, self.raw.micro
        )


def copy_ahead(batches: Iterable[CropBatch], device: torch.device) -> Iterator[CropBatch]:
    """The same batches with their images on `device`. On CUDA, the next one is copied while one is computed.

    The copy runs on a stream of its own, from pinned memory. Labels stay where they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = _side_stream(device)
    ahead: tuple[CropBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = replace(batch, images=batch.images.to(device, non_blocking=True).contiguous())
            event = side.record_event()
        if ahead is not None:
            yield _hand_over(*ahead)
        ahead = copied, event
    if ahead is not None:
        yield _hand_over(*ahead)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream for copies to `device`: torch gives what was freed on a stream to that stream alone."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _hand_over(batch: CropBatch, copied: torch.cuda.Event) -> CropBatch:
    """Make the consumer's stream wait for the copy, and the copy's memory wait for the consumer's stream."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    batch.images.record_stream(stream)
    return batch
