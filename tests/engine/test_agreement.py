"""Data that one rank cannot read ends all ranks at the same step, and bad samples are listed once."""

import json
from pathlib import Path

import pytest

from cmae_scale.core.errors import DataError
from cmae_scale.engine.safety.agreement import Agreement, PeerFailedError
from cmae_scale.engine.watch.bad_list import BadList


def test_alone_it_is_the_work_itself() -> None:
    def fail() -> None:
        raise DataError("cut")

    assert Agreement().do(lambda: 3) == 3
    with pytest.raises(DataError, match="cut"):
        Agreement().do(fail)


@pytest.mark.dist
@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError])
def test_when_one_rank_fails_all_end_at_the_same_step(on_ranks, kind: type[Exception]) -> None:
    def run() -> tuple[int, str, str]:
        from cmae_scale.engine.start import start_processes

        rank = start_processes().world.rank
        agreement = Agreement()

        def read(step: int) -> int:
            if rank == 1 and step == 3:
                raise kind("shard is cut")
            return step

        for step in range(10):
            try:
                assert agreement.do(lambda step=step: read(step)) == step
            except (kind, PeerFailedError) as error:
                return step, type(error).__name__, str(error)
        raise AssertionError("nothing failed")

    first, second = on_ranks(run, ranks=2)
    assert first[:2] == (3, "PeerFailedError")
    assert "rank 1" in first[2]
    assert second == (3, kind.__name__, "shard is cut")


@pytest.mark.dist
def test_bad_samples_of_all_ranks_are_listed_once(on_ranks, tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"

    def run() -> None:
        from cmae_scale.engine.start import start_processes

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
