"""Memory of batches: used again when nobody looks at it any more, and never before."""

import gc

import torch

from cmae_scale.data.decoding import BatchMemory


def test_memory_is_used_again_when_its_last_tensor_is_gone() -> None:
    memory = BatchMemory(pin=False)
    tensor = memory.take((4, 5))
    location = tensor.data_ptr()
    row = tensor.permute(1, 0)[2]
    del tensor
    gc.collect()
    assert memory.take((4, 5)).data_ptr() != location, "a row of it is still looked at"
    del row
    gc.collect()
    assert memory.take((5, 4)).data_ptr() == location


def test_what_is_kept_keeps_its_content() -> None:
    memory = BatchMemory(pin=False)
    kept = [memory.take((100,)).fill_(number) for number in range(10)]
    seen_as_array = [tensor.numpy() for tensor in kept[:5]]
    del kept[:5]
    for _ in range(20):
        memory.take((100,)).fill_(99)
    for number, tensor in enumerate([*map(torch.from_numpy, seen_as_array), *kept]):
        assert tensor.unique().tolist() == [number]


def test_other_sizes_get_memory_of_their_own() -> None:
    memory = BatchMemory(pin=False)
    del (first := [memory.take((8,))])[:]
    assert memory.take((16,)).shape == (16,)
    assert not first
