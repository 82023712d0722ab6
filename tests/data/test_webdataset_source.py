"""Our order of samples in pipelines of webdataset's, and our tars beside those of its writer."""

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset
from torch.utils.data import DataLoader

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.stream import open_batches
from cmae_scale.data.webdataset_source import ExactSource

Source = Callable[..., ExactSource]
BATCH = 6


@pytest.fixture
def folder(make_folder: Any) -> Path:
    path: Path = make_folder("a", (7, 8, 10))
    return path


@pytest.fixture
def open_source(folder: Path) -> Source:
    """`open_source(rank=0, ranks=1, ...)`: the source of a folder of 25 samples, a batch of 6 a step."""

    def build(**options: Any) -> ExactSource:
        data = DataConfig(shards="x", shuffle_window=4)
        return ExactSource(str(folder), batch=BATCH, seed=3, data=data, **options)

    return build


def read_keys(source: ExactSource, count: int) -> list[str]:
    return [f"{sample['__url__']}/{sample['__key__']}" for sample in islice(source, count)]


def test_the_order_is_that_of_pretraining(open_source: Source, folder: Path) -> None:
    data = DataConfig(shards=str(folder), shuffle_window=4, workers=1)
    shards = open_shards(str(folder), data=data)
    stream = open_batches(
        shards, plan_data(shards, data, global_batch=BATCH, seed=3),
        views=ViewsConfig(img_px=16, master_px=20, shift_px=4), data=data, rank=0, ranks=1, accumulation=1,
        first_step=0, end_step=9, pin=False, bad=BadSamples(1.0),
    )  # fmt: skip
    with stream:
        keys = [key for batch in stream for key in batch.keys]
    source = open_source()
    assert read_keys(source, len(keys)) == keys
    assert source.epoch_samples == 24
    assert len(set(keys[:24])) == 24


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_every_batch(open_source: Source, ranks: int) -> None:
    local, steps = BATCH // ranks, 9
    parts = [read_keys(open_source(rank=rank, ranks=ranks), local * steps) for rank in range(ranks)]
    joined = [key for step in range(steps) for part in parts for key in part[step * local :][:local]]
    assert joined == read_keys(open_source(), BATCH * steps)


@pytest.mark.parametrize("first", [0, 1, 5, 6, 23, 24, 25, 40])
def test_it_goes_on_from_any_sample(open_source: Source, first: int) -> None:
    assert read_keys(open_source(first_sample=first), 10) == read_keys(open_source(), first + 10)[first:]


def test_it_is_the_first_stage_of_a_pipeline(open_source: Source) -> None:
    pipeline = webdataset.DataPipeline(
        open_source(),
        webdataset.decode("pil"),
        webdataset.to_tuple("__key__", "jpg;jpeg;png;webp", "cls"),
        webdataset.batched(4, partial=False),
    )
    for keys, images, labels in islice(pipeline, 5):
        assert len(keys) == len(images) == len(labels) == 4
        assert all(image.mode == "RGB" for image in images)
        assert labels.dtype.kind == "i"
    seen = [key for keys, _, _ in islice(pipeline, 5) for key in keys]
    assert seen == [key.rpartition("/")[2] for key in read_keys(open_source(), 20)]


def test_the_example_of_the_documentation_runs(
    folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code.replace("shards/mine/train", str(folder)).replace("batch=256", "batch=8"), found)
    images, labels = next(iter(found["pipeline"]))
    assert len(images) == len(labels) == 64


def test_a_loader_of_one_worker_takes_it_and_one_of_several_is_told(open_source: Source) -> None:
    loader = DataLoader(open_source(), batch_size=None, num_workers=1)
    assert [sample["__key__"] for sample in islice(loader, 8)] == [
        key.rpartition("/")[2] for key in read_keys(open_source(), 8)
    ]
    with pytest.raises(ConfigError, match="num_workers=1"):
        next(iter(DataLoader(open_source(), batch_size=None, num_workers=2)))


def test_damage_is_an_error(open_source: Source, folder: Path) -> None:
    source = open_source()
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-2048])
    with pytest.raises(DataError, match=r"shard-00001\.tar"):
        read_keys(source, 24)


def test_a_batch_is_spread_evenly(open_source: Source) -> None:
    with pytest.raises(ConfigError, match="batch 6 cannot be spread evenly over 4 ranks"):
        open_source(ranks=4)


def list_samples(folder: Path) -> Iterator[dict[str, Any]]:
    for sample in webdataset.WebDataset(str(folder / "shard-00002.tar"), shardshuffle=False):
        yield {name: value for name, value in sample.items() if name[:2] != "__" or name == "__key__"}


def test_our_tars_are_those_of_webdatasets_writer(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    with again.open("wb") as file:
        writer = webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)
        for sample in list_samples(folder):
            key, label = sample.pop("__key__"), sample.pop("cls")
            writer.write(
                {"__key__": key, **sample}
            )  # it sorts the members of a sample: ours begins with the image
            writer.write({"__key__": key, "cls": label})
        writer.close()
    ours = folder / "shard-00002.tar"
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(ours.read_bytes()).hexdigest()
