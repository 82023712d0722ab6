"""Copying ahead: nothing happens on the CPU; on a GPU values arrive unharmed while the next batch travels."""

from collections.abc import Iterator

import pytest
import torch

from cmae_scale.data.stream import CropBatch, copy_ahead


def make_batch(step: int, *, pin: bool = False) -> CropBatch:
    images = torch.full((8, 1, 3, 64, 64), step % 251, dtype=torch.uint8)
    return CropBatch(
        images.pin_memory() if pin else images, torch.zeros(8, dtype=torch.int64), ("k",) * 8, step, 0
    )


def test_on_the_cpu_batches_pass_through_one_at_a_time() -> None:
    taken = []

    def batches() -> Iterator[CropBatch]:
        for step in range(3):
            taken.append(step)
            yield make_batch(step)

    copied = copy_ahead(batches(), torch.device("cpu"))
    assert next(copied).step == 0
    assert taken == [0]
    assert [batch.step for batch in copied] == [1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_batch_arrives_whole_while_the_device_is_busy() -> None:
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    sums = []
    for batch in copy_ahead((make_batch(step, pin=True) for step in range(50)), device):
        work = work @ work / 64  # keeps the consumer's stream behind the copies
        sums.append((batch.step, batch.images.sum(dtype=torch.int64)))
    assert len(sums) == 50
    for step, total in sums:
        assert int(total) == step % 251 * 8 * 3 * 64 * 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_one_batch_is_taken_ahead() -> None:
    taken = []

    def batches() -> Iterator[CropBatch]:
        for step in range(3):
            taken.append(step)
            yield make_batch(step, pin=True)

    copied = copy_ahead(batches(), torch.device("cuda"))
    assert next(copied).step == 0
    assert taken == [0, 1]
    assert [batch.step for batch in copied] == [1, 2]
