"""Shards of a run on two machines of two ranks each: who looks, and what all are told."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.collectives import find_together
from cmae_scale.core.errors import DataError
from cmae_scale.core.world import World
from cmae_scale.data import storage
from cmae_scale.data.shard_set import ShardSet, open_shards

pytestmark = pytest.mark.dist
RANKS = 4


@pytest.fixture
def open_on_nodes(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> Callable[[], list[Any]]:
    """On each rank: samples or what was said, and how many shards it asked for their size."""

    def open_on_rank() -> tuple[Any, int]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        world = World(dist.get_rank(), RANKS, local_rank=dist.get_rank() % 2)
        node = f"node{world.rank // 2}"
        socket.gethostname = lambda: node
        os.chdir(tmp_path / node)
        asked, measure = [], storage.measure_shard
        storage.measure_shard = lambda path: asked.append(path) or measure(path)
        data = DataConfig.model_validate({"shards": "train"})
        try:
            found = find_together(
                lambda: open_shards("train", data=data, measure=world.is_first_of_node),
                fingerprint=ShardSet.fingerprint,
            )
        except DataError as error:
            return (str(error), error.is_everywhere), len(asked)
        return found.total, len(asked)

    return lambda: on_ranks(open_on_rank, ranks=RANKS)


def test_one_rank_of_each_node_asks_for_sizes(make_folder, open_on_nodes) -> None:
    for node in ("node0", "node1"):
        make_folder(f"{node}/train", (2, 3, 1))
    assert open_on_nodes() == [(6, 3), (6, 0), (6, 3), (6, 0)]


@pytest.mark.parametrize("lost", ["shard-00001.tar", "index.json"])
def test_a_node_that_lacks_shards_is_named_on_all_ranks(make_folder, open_on_nodes, lost: str) -> None:
    folders = [make_folder(f"{node}/train", (2, 3)) for node in ("node0", "node1")]
    (folders[1] / lost).unlink()
    said = [one for one, _ in open_on_nodes()]
    assert said == [said[0]] * RANKS
    words, is_everywhere = said[0]
    assert words.startswith("rank 2 on node1: train")
    assert lost in words
    assert is_everywhere


def test_what_every_node_lacks_is_said_as_to_a_lone_process(make_folder, open_on_nodes, monkeypatch) -> None:
    folders = [make_folder(f"{node}/train", (2, 3)) for node in ("node0", "node1")]
    for folder in folders:
        (folder / "shard-00001.tar").write_bytes(b"cut")
    monkeypatch.chdir(folders[0].parent)
    with pytest.raises(DataError) as alone:
        open_shards("train", data=DataConfig.model_validate({"shards": "train"}))
    assert [one for one, _ in open_on_nodes()] == [(str(alone.value), True)] * RANKS


def test_a_node_whose_shards_differ_is_named_on_all_ranks(make_folder, open_on_nodes) -> None:
    make_folder("node0/train", (2, 3))
    make_folder("node1/train", (3, 2))
    words = "rank 2 on node1 finds other shards than rank 0 on node0: copy them there again"
    assert [one for one, _ in open_on_nodes()] == [(words, True)] * RANKS
