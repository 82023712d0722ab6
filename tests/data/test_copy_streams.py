"""Copying ahead on a GPU that is not there: nothing is used before it is there, or given away too early."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cmae_scale.data import stream
from cmae_scale.data.stream import CropBatch, copy_ahead
from tests.fakes.gpu import CUDA, FakeGpu, fake_gpu
from tests.fakes.streams import FakeEvent, RaceError


def make_batches(count: int) -> Iterator[CropBatch]:
    for step in range(count):
        images = torch.zeros(4, 1, 3, 8, 8, dtype=torch.uint8)
        yield CropBatch(images, torch.zeros(4, dtype=torch.int64), ("k",) * 4, step, 0)


def consume(count: int, *, kept: int = 0) -> None:
    """Work on each batch; `kept` of them are held on to."""
    held: list[torch.Tensor] = []
    for batch in copy_ahead(make_batches(count), CUDA):
        held = [*held, batch.images.float().mean((2, 3, 4))][-3:]
        held += [batch.images][: max(0, kept - batch.step)]
        del batch


@hypothesis.settings(max_examples=20)
@hypothesis.given(count=st.integers(0, 8), kept=st.integers(0, 3), has_own=st.booleans())
def test_copies_and_work_are_in_order(count: int, kept: int, has_own: bool) -> None:
    """However many batches, whatever is held on to, also with the consumer on a stream of its own."""
    with fake_gpu() as gpu, torch.cuda.stream(torch.cuda.Stream() if has_own else gpu.streams.default):
        consume(count, kept=kept)
        assert gpu.waits == []


def never_wait(batch: CropBatch, copied: FakeEvent) -> CropBatch:
    batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
    return batch


def wait_for_another(batch: CropBatch, copied: FakeEvent) -> CropBatch:
    """For an event of before the copy."""
    torch.cuda.current_stream(batch.images.device).wait_event(torch.cuda.Event())
    batch.images.record_stream(torch.cuda.current_stream(batch.images.device))
    return batch


def never_record(batch: CropBatch, copied: FakeEvent) -> CropBatch:
    torch.cuda.current_stream(batch.images.device).wait_event(copied)
    return batch


def record_the_wrong_stream(batch: CropBatch, copied: FakeEvent) -> CropBatch:
    torch.cuda.current_stream(batch.images.device).wait_event(copied)
    batch.images.record_stream(torch.cuda.Stream())
    return batch


@pytest.mark.parametrize(
    ("hand_over", "found"),
    [
        (never_wait, "may not have written yet"),
        (wait_for_another, "may not have written yet"),
        (never_record, "while another stream may use it"),
        (record_the_wrong_stream, "while another stream may use it"),
    ],
)
def test_planted_races_are_found(
    monkeypatch: pytest.MonkeyPatch, hand_over: Callable[..., CropBatch], found: str
) -> None:
    monkeypatch.setattr(stream, "_hand_over", hand_over)
    with fake_gpu(), pytest.raises(RaceError, match=found):
        consume(6)


def test_without_a_stream_of_its_own_nothing_needs_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder must not find: one stream is always in order."""
    monkeypatch.setattr(stream, "_hand_over", lambda batch, copied: batch)
    with fake_gpu() as gpu:
        monkeypatch.setattr(stream, "_side_stream", lambda device: gpu.streams.default)
        monkeypatch.setattr(stream._side_stream, "cache_clear", lambda: None, raising=False)
        consume(6)


def test_a_copy_that_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_at_once(batches: Iterator[CropBatch], device: torch.device) -> Iterator[CropBatch]:
        return (replace(batch, images=batch.images.to(device)) for batch in batches)

    with fake_gpu() as gpu:
        for batch in copy_at_once(make_batches(3), CUDA):
            batch.images.float()
        assert [wait.what for wait in gpu.waits] == ["blocking copy to the GPU"] * 3


def synchronised(gpu: FakeGpu, tensor: torch.Tensor, side: torch.cuda.Stream) -> None:
    side.synchronize()


def joined(gpu: FakeGpu, tensor: torch.Tensor, side: torch.cuda.Stream) -> None:
    torch.cuda.current_stream().wait_stream(side)


def told_by_an_event(gpu: FakeGpu, tensor: torch.Tensor, side: torch.cuda.Stream) -> None:
    side.record_event().wait()


def left_alone(gpu: FakeGpu, tensor: torch.Tensor, side: torch.cuda.Stream) -> None:
    pass


def waited_the_wrong_way(gpu: FakeGpu, tensor: torch.Tensor, side: torch.cuda.Stream) -> None:
    side.wait_stream(torch.cuda.current_stream())


@pytest.mark.parametrize("order", [synchronised, joined, told_by_an_event])
def test_every_way_to_put_streams_in_order_counts(order: Callable[..., None]) -> None:
    run_in_two_streams(order)


@pytest.mark.parametrize("order", [left_alone, waited_the_wrong_way])
def test_no_other_way_does(order: Callable[..., None]) -> None:
    with pytest.raises(RaceError):
        run_in_two_streams(order)


def run_in_two_streams(order: Callable[..., None]) -> None:
    with fake_gpu() as gpu:
        tensor, side = torch.zeros(3, device=CUDA), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            tensor.add_(1.0)
        order(gpu, tensor, side)
        tensor.mul(2.0)
