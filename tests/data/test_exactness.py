"""What is read, in which order and how often, over a grid of worlds and without a process group."""

import io
import itertools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmae_scale.config.cmae import DataConfig
from cmae_scale.data.blocks import read_raw_batches
from cmae_scale.data.mix import MixPlan, plan_data
from cmae_scale.data.offsets import write_offsets
from cmae_scale.data.shard_set import ShardSet, open_shards
from cmae_scale.data.storage import LocalStorage
from cmae_scale.data.tar import find_offsets

SHARDS = (37, 64, 5, 80, 1, 53)


class Reading(NamedTuple):
    """One read of a shard: which opening of it, from where, how many bytes."""

    opening: int
    location: str
    start: int
    bytes: int


class WatchedStorage(LocalStorage):
    """Writes down every byte that is read of a tar."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[Reading] = []
        self.openings = itertools.count()

    def open_file(self, location: str, **options: Any) -> io.RawIOBase:
        file = super().open_file(location, **options)
        return _WatchedFile(file, location, self) if location.endswith(".tar") else file


class _WatchedFile(io.RawIOBase):
    def __init__(self, file: io.RawIOBase, location: str, storage: WatchedStorage) -> None:
        self.file, self.location, self.storage = file, location, storage
        self.opening = next(storage.openings)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: memoryview) -> int:
        start = self.file.tell()
        count = self.file.readinto(buffer) or 0
        self.storage.readings.append(Reading(self.opening, self.location, start, count))
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


@pytest.fixture(scope="module")
def folder(write_folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with offsets beside them."""
    folder: Path = write_folder(tmp_path_factory.mktemp("exact") / "a", SHARDS)
    for shard in load(folder).shards:
        with Path(shard.location).open("rb") as file:
            write_offsets(Path(shard.location), find_offsets(file, name=shard.name), sha256=shard.info.sha256)
    return folder


@pytest.fixture
def shards(folder: Path) -> ShardSet:
    return watched(load(folder))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much smaller than usual as these shards are."""
    monkeypatch.setattr("cmae_scale.data.tar.READ_BYTES", 1024)


def load(folder: Path) -> ShardSet:
    return open_shards(str(folder), data=DataConfig(shards=str(folder)))


def watched(shards: ShardSet) -> ShardSet:
    storage = WatchedStorage()
    return replace(shards, shards=tuple(replace(shard, storage=storage) for shard in shards.shards))


def readings(shards: ShardSet) -> list[Reading]:
    storage = shards.shards[0].storage
    assert isinstance(storage, WatchedStorage)
    return storage.readings


def plan_of(shards: ShardSet, *, batch: int, streams: int, window: int) -> MixPlan:
    data = DataConfig(shards="unused", streams=streams, shuffle_window=window)
    return plan_data(shards, data, global_batch=batch, seed=7)


def read_keys(
    shards: ShardSet, plan: MixPlan, *, rank: int = 0, ranks: int = 1, accumulation: int = 1, steps: range
) -> list[list[str]]:
    """The keys of each step's rows of a rank, as read from the tars."""
    batches = read_raw_batches(
        shards, plan, rank=rank, ranks=ranks, accumulation=accumulation, steps=steps, stop=threading.Event()
    )
    found: dict[int, list[str]] = {step: [] for step in steps}
    for batch in batches:
        for row in batch.rows:
            found[batch.step].append(next(row.block.candidates(row.slot, distance=1)).key)
    return list(found.values())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_world_reads_the_same_global_batches_from_any_step(folder: Path, data: st.DataObject) -> None:
    shards = load(folder)
    streams = data.draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), label="streams")
    batch = streams * data.draw(st.sampled_from([1, 2, 4]), label="rows of a stream")
    plan = plan_of(shards, batch=batch, streams=streams, window=data.draw(st.integers(1, 40), label="window"))
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    ranks = data.draw(st.sampled_from(divisors), label="ranks")
    accumulation = data.draw(st.sampled_from([n for n in divisors if batch // ranks % n == 0]), label="acc")
    first = data.draw(st.integers(0, plan.steps_per_epoch + 3), label="first step")
    steps = range(first, first + 4)
    straight = read_keys(shards, plan, steps=range(first + 4))[first:]
    parts = [
        read_keys(shards, plan, rank=rank, ranks=ranks, accumulation=accumulation, steps=steps)
        for rank in range(ranks)
    ]
    assert [[key for part in parts for key in part[step]] for step in range(4)] == straight


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("streams", "window"), [(1, 16), (4, 7), (12, 16), (12, 256)])
def test_an_epoch_has_every_sample_once_but_for_the_tail_and_reads_no_byte_too_many(
    shards: ShardSet, ranks: int, streams: int, window: int
) -> None:
    plan = plan_of(shards, batch=12, streams=max(streams, ranks), window=window)
    steps = range(plan.steps_per_epoch)
    keys = [
        key
        for rank in range(ranks)
        for step in read_keys(shards, plan, rank=rank, ranks=ranks, steps=steps)
        for key in step
    ]
    assert len(keys) == len(set(keys)) == plan.total - plan.parts[0].tail
    assert plan.parts[0].tail < 12
    # what the next epoch's first window costs is not this epoch's
    ahead = plan.streams * min(window, plan.parts[0].run_samples) / plan.total
    stored = sum(shard.info.bytes for shard in shards.shards)
    assert sum(reading.bytes for reading in readings(shards)) <= 1.05 * stored * (1 + ahead)


def test_two_epochs_read_five_percent_more_bytes_than_twice_the_shards_at_most(shards: ShardSet) -> None:
    plan = plan_of(shards, batch=12, streams=12, window=1)
    read_keys(shards, plan, steps=range(2 * plan.steps_per_epoch))
    stored = sum(shard.info.bytes for shard in shards.shards)
    assert sum(reading.bytes for reading in readings(shards)) <= 1.05 * 2 * stored


def test_every_opened_tar_is_read_front_to_back(shards: ShardSet) -> None:
    plan = plan_of(shards, batch=12, streams=4, window=9)
    read_keys(shards, plan, steps=range(2 * plan.steps_per_epoch))
    for _, group in itertools.groupby(sorted(readings(shards)), key=lambda reading: reading.opening):
        inside = list(group)
        assert all(one.start + one.bytes == other.start for one, other in itertools.pairwise(inside))


@pytest.mark.parametrize("first", [1, 5, 17, 19, 20, 33])
def test_resuming_reads_at_most_one_window_of_each_stream_again(shards: ShardSet, first: int) -> None:
    plan = plan_of(shards, batch=8, streams=4, window=10)
    part = plan.parts[0]
    read_keys(shards, plan, steps=range(first, first + 1))
    resumed = sum(reading.bytes for reading in readings(shards))
    largest = max(shard.info.bytes / shard.info.samples for shard in shards.shards if shard.info.samples > 4)
    windows = plan.streams * (
        part.window + part.stream_rows + part.window
    )  # its own, and one that it crosses
    assert resumed <= windows * largest * 1.1 + 10_240


def test_without_offsets_the_samples_are_the_same(make_folder, shards: ShardSet) -> None:
    plan = plan_of(shards, batch=12, streams=4, window=9)
    plain = load(make_folder("b", SHARDS))
    steps = range(plan.steps_per_epoch)
    assert read_keys(plain, plan, steps=steps) == read_keys(shards, plan, steps=steps)
