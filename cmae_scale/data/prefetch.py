"""Copies to the device one batch ahead of the model."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

import torch

from cmae_scale.data.stream import CropBatch


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
