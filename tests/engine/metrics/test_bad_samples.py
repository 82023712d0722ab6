"""Bad samples of all ranks are listed once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.engine.metrics.files import BadList


@pytest.mark.dist
def test_bad_samples_of_all_ranks_are_listed_once(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"

    def run() -> None:
        from cmae_scale.engine.process.group import start_processes

        world = start_processes().world
        bad_list = BadList(path, is_first=world.is_first)
        bad_list.add([("a.tar/1", "cut"), (f"a.tar/{world.rank + 5}", "not an image")])
        bad_list.add([("a.tar/1", "cut"), ("a.tar/7", "cut")])

    on_ranks(run, ranks=2)
    with path.open("a") as file:
        file.write('{"key": "torn')
    BadList(path, is_first=True).add([("a.tar/5", "again, after a restart")])
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()[:4]]
    assert keys == ["a.tar/1", "a.tar/5", "a.tar/6", "a.tar/7"]
    assert len(path.read_text().splitlines()) == 5
