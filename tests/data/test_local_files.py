"""Local files that stall, as those of a network mount do whose server is gone: one sentence, and soon."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data import storage
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import ShardSet, open_shards
from cmae_scale.data.stream import open_batches

VIEWS = ViewsConfig(img_px=16, master_px=20, shift_px=4)
MESSAGE = r"{} cannot be read: nothing came for 1 s: look at the disk or the network mount, or raise"


def settings(folder: Path) -> DataConfig:
    return DataConfig(shards=str(folder), read_timeout_s=1.0, workers=2, streams=1, shuffle_window=4)


def open_set(folder: Path) -> ShardSet:
    return open_shards(str(folder), data=settings(folder))


def hang(path: Path) -> None:
    """Put something in the file's place that makes whoever opens it wait."""
    path.unlink()
    os.mkfifo(path)


def test_an_index_that_does_not_come(make_folder) -> None:
    folder = make_folder("a", (4,))
    hang(folder / "index.json")
    with pytest.raises(DataError, match=MESSAGE.format(r"a/index\.json")):
        open_set(folder)


def test_a_shard_that_cannot_be_opened(make_folder) -> None:
    folder = make_folder("a", (4,))
    shard = open_set(folder).shards[0]
    hang(folder / "shard-00000.tar")
    with pytest.raises(DataError, match=MESSAGE.format(r"a/shard-00000\.tar")):
        list(shard.read(0, 4))


def test_a_folder_that_does_not_answer(make_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("a", (4, 5))
    stat = storage.measure_shard
    release = threading.Event()

    def stall(path: str) -> int:
        if path.endswith("1.tar"):
            release.wait()
        return stat(path)

    monkeypatch.setattr(storage, "measure_shard", stall)
    with pytest.raises(DataError, match=MESSAGE.format(r"a/shard-00001\.tar")):
        open_set(folder)
    release.set()


def test_a_shard_that_stops_in_the_middle_ends_the_stream_at_that_batch(
    make_folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("a", (30, 30), side=64)
    monkeypatch.setattr("cmae_scale.data.tar.READ_BYTES", 4096)
    release, is_gone = threading.Event(), threading.Event()

    class MountedFile(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            if is_gone.is_set() and str(self.name).endswith(".tar"):
                release.wait()
            return super().readinto(buffer)

    monkeypatch.setattr(storage.io, "FileIO", MountedFile)
    shards, data = open_set(folder), settings(folder)
    stream = open_batches(
        shards, plan_data(shards, data, global_batch=2, seed=5), views=VIEWS, data=data, rank=0, ranks=1,
        accumulation=1, first_step=0, end_step=99, pin=False, bad=BadSamples(1.0),
    )  # fmt: skip
    with stream:
        next(stream)
        is_gone.set()
        with pytest.raises(DataError, match=MESSAGE.format(r"shard-0000\d\.tar")):
            list(stream)
    release.set()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("data ")]
