"""index.json: what is written comes back, and every contradiction is told."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.core.errors import DataError
from cmae_scale.data.index import ShardIndex, ShardInfo, read_index, write_index


def make_index(folder: Path, *, shards: int = 3, classes: tuple[str, ...] = ("cat", "Ähre")) -> ShardIndex:
    """Files with arbitrary content: the index looks at names and sizes only."""
    folder.mkdir()
    infos = []
    for number in range(shards):
        content = bytes([number]) * (10 + number)
        (folder / f"shard-{number:05d}.tar").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        infos.append(
            ShardInfo(f"shard-{number:05d}.tar", samples=number + 1, bytes=len(content), sha256=digest)
        )
    total = sum(info.samples for info in infos)
    index = ShardIndex(
        folder, tuple(infos), classes, total, source="made up", options={"seed": 3, "limit": None}
    )
    write_index(index)
    return index


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    index = make_index(tmp_path / "a")
    assert read_index(tmp_path / "a") == index
    assert read_index(str(tmp_path / "a")).path(1).read_bytes() == b"\x01" * 11


def test_nothing_but_the_index_and_its_classes_is_left_behind(tmp_path: Path) -> None:
    make_index(tmp_path / "a", shards=1)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["classes.json", "index.json", "shard-00000.tar"]


Damage = Callable[[dict[str, Any]], object]
DAMAGES: list[tuple[Damage, str]] = [
    (lambda j: j.update(format=2), "format 2, this version reads 1"),
    (lambda j: j.pop("format"), "format None"),
    (lambda j: j.update(total=99), "total 99 but its shards hold 6"),
    (lambda j: j.update(total="6"), "total: Input should be a valid integer"),
    (lambda j: j.pop("classes"), "classes: Field required"),
    (lambda j: j.update(shard=[]), "shard: Extra inputs"),
    (lambda j: j.update(shards=[]), "shards: Tuple should have at least 1 item"),
    (lambda j: j["shards"][0].update(name="../other.tar"), "shards.0.name"),
    (lambda j: j["shards"][0].update(name="/etc/other.tar"), "shards.0.name"),
    (lambda j: j["shards"][0].update(name="a\\b.tar"), "shards.0.name"),
    (lambda j: j["shards"][0].update(name="shard-00001.tar"), "lists a shard twice"),
    (lambda j: j["shards"][1].update(samples=0), "shards.1.samples"),
    (lambda j: j["shards"][1].update(bytes=12), "shard-00001.tar has 11 bytes, index.json says 12"),
    (lambda j: j["shards"][1].update(sha256="00"), "shards.1.sha256"),
    (lambda j: j["shards"][1].update(name="none.tar"), "none.tar is missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_contradiction_is_a_data_error_that_names_it(tmp_path: Path, damage: Damage, message: str) -> None:
    make_index(tmp_path / "a")
    path = tmp_path / "a" / "index.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_index(tmp_path / "a")
    assert message in str(error.value)
    assert str(tmp_path / "a") in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[1, 2]", "\x00", '{"format": 1}'])
def test_any_other_content_is_a_data_error(tmp_path: Path, text: str) -> None:
    make_index(tmp_path / "a")
    (tmp_path / "a" / "index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json"):
        read_index(tmp_path / "a")


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_an_index_tells_the_command_that_makes_one(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "a"
    if exists:
        folder.mkdir()
    with pytest.raises(
        DataError, match=rf"make_shards\.py --source imagefolder --root IMAGES --out {folder}"
    ):
        read_index(folder)


def test_the_index_is_replaced_as_a_whole(tmp_path: Path) -> None:
    index = make_index(tmp_path / "a")
    write_index(dataclasses.replace(index, source="again"))
    assert read_index(tmp_path / "a").source == "again"
