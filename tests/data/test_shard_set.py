"""Which shards the setting cmae.data.shards means, and what is told when they are not there."""

from pathlib import Path

import pytest

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.index import read_index
from cmae_scale.data.offsets import offsets_name, write_offsets
from cmae_scale.data.shard_set import ShardSet, open_shards
from cmae_scale.data.tar import find_offsets


def open_set(*locations: str | Path, **settings: object) -> ShardSet:
    names = tuple(str(location) for location in locations)
    return open_shards(names, data=DataConfig.model_validate({"shards": names, **settings}, strict=False))


def test_one_folder_is_its_index(make_folder) -> None:
    folder = make_folder("a", (2, 3))
    shards = open_set(folder)
    assert tuple(shard.info for shard in shards.shards) == read_index(folder).shards
    assert [shard.name for shard in shards.shards] == ["shard-00000.tar", "shard-00001.tar"]
    assert [shard.location for shard in shards.shards] == [
        str(folder / shard.name) for shard in shards.shards
    ]
    assert (shards.total, shards.parts, len(shards.classes or ())) == (5, (2,), 10)


def test_several_folders_are_one_set_with_names_that_differ(make_folder) -> None:
    folders = [make_folder("x/a", (2, 1)), make_folder("x/b", (3,))]
    shards = open_set(*folders)
    assert [shard.name for shard in shards.shards] == [
        "a/shard-00000.tar",
        "a/shard-00001.tar",
        "b/shard-00000.tar",
    ]
    assert shards.parts == (2, 1)


@pytest.mark.parametrize("pattern", ["x/*", "x/[ab]", "x/{a,b}", "x/?"])
def test_globs_and_braces_name_folders(make_folder, tmp_path: Path, pattern: str) -> None:
    make_folder("x/a", (2,))
    make_folder("x/b", (3,))
    assert open_set(tmp_path / pattern).total == 5


@pytest.mark.parametrize(
    ("pattern", "samples"),
    [
        ("shard-{00001..00003}.tar", 2 + 3 + 4),
        ("shard-0000[02].tar", 1 + 3),
        ("shard-*.tar", 10),
        ("{shard-00000,shard-00003}.tar", 1 + 4),
    ],
)
def test_patterns_of_tars_choose_shards_of_an_index(make_folder, pattern: str, samples: int) -> None:
    assert open_set(make_folder("a", (1, 2, 3, 4)) / pattern).total == samples


def test_a_shard_that_the_index_does_not_list_is_named(make_folder) -> None:
    folder = make_folder("a", (1, 2))
    with pytest.raises(DataError, match=r"index\.json lists no shard shard-00002\.tar"):
        open_set(folder / "shard-{00000..00002}.tar")


@pytest.mark.parametrize("location", ["no/such/folder", "no/such/*"])
def test_places_where_nothing_is(tmp_path: Path, location: str) -> None:
    with pytest.raises(DataError, match=r"holds no index\.json|nothing matches"):
        open_set(tmp_path / location)


def test_the_same_shard_twice_is_refused(make_folder) -> None:
    folder = make_folder("a", (1, 2))
    with pytest.raises(ConfigError, match="a shard twice"):
        open_set(folder, folder / "shard-00001.tar")
    assert open_set(folder / "shard-00000.tar", folder / "shard-00001.tar").parts == (1, 1)


@pytest.mark.parametrize("location", ["ftp://host/x", "sftp://host/x", "file:///etc", "ais://x/y", "s3:x"])
def test_other_schemes_are_refused_by_name(location: str) -> None:
    with pytest.raises(ConfigError, match="shards are not read from"):
        open_set(location)


def test_a_backward_or_endless_range_is_refused() -> None:
    for location in ("a{5..2}", "a{0..99999999}"):
        with pytest.raises(ConfigError, match="must count upwards"):
            open_set(location)


def test_missing_and_resized_shards_are_named_before_anything_is_read(make_folder) -> None:
    folder = make_folder("a", (1, 2))
    (folder / "shard-00001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-00001\.tar has 0 bytes, index\.json says 10240"):
        open_set(folder)
    (folder / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar is missing"):
        open_set(folder)
    assert open_set(folder / "shard-00000.tar").total == 1


def test_other_classes_join_only_in_a_mix_and_then_have_no_labels(make_folder) -> None:
    folders = [make_folder("a", (4,)), make_folder("b", (4,), classes=("cat", "dog"))]
    with pytest.raises(DataError, match="other classes"):
        open_set(*folders)
    shards = open_set(*folders, mix=(1.0, 2.0))
    assert shards.classes is None
    assert not any(shard.has_labels for shard in shards.shards)


def test_offsets_beside_a_shard_give_the_same_samples(make_folder) -> None:
    folder = make_folder("a", (9,))
    shard = open_set(folder).shards[0]
    expected = list(shard.read(0, 9))
    path = folder / "shard-00000.tar"
    with path.open("rb") as file:
        offsets = find_offsets(file, name="a")
    assert len(offsets) == 10
    write_offsets(path, offsets, sha256=shard.info.sha256)
    for first in range(9):
        for count in range(1, 10 - first):
            assert list(shard.read(first, count)) == expected[first : first + count]


def test_offsets_are_read_once_and_looked_for_again_where_they_were_missing(make_folder) -> None:
    folder = make_folder("a", (9,))
    shard = open_set(folder).shards[0]
    expected = list(shard.read(0, 9))
    assert list(shard.read(3, 2)) == expected[3:5], "by the headers"
    path = folder / "shard-00000.tar"
    with path.open("rb") as file:
        write_offsets(path, find_offsets(file, name="a"), sha256=shard.info.sha256)
    assert list(shard.read(3, 2)) == expected[3:5]
    (folder / offsets_name(path.name)).unlink()
    path.write_bytes(b"x" * 512 + path.read_bytes()[512:])  # no headers lead to the fourth sample any more
    assert list(shard.read(3, 2)) == expected[3:5]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"sha256":"0","blocks":[0,1,2,3]}', '{"sha256":"SHA","blocks":[0,9,3,12]}', "\xff"],
)
def test_useless_offsets_are_not_used(make_folder, text: str) -> None:
    folder = make_folder("a", (3,))
    shard = open_set(folder).shards[0]
    (folder / offsets_name(shard.info.name)).write_text(text.replace("SHA", shard.info.sha256), "latin-1")
    assert [sample.key for sample in shard.read(1, 1)] == ["000000001"]


def test_offsets_that_point_elsewhere_are_damage_not_other_samples(make_folder) -> None:
    folder = make_folder("a", (3,))
    shard = open_set(folder).shards[0]
    write_offsets(folder / shard.info.name, [512, 3072, 5120, 7168], sha256=shard.info.sha256)
    with pytest.raises(DataError, match="damaged"):
        list(shard.read(0, 2))


def test_a_label_that_no_class_has_is_an_error_where_classes_are_counted(make_folder) -> None:
    folder = make_folder("a", (5,), classes=("0", "1", "2"))
    shard = open_set(folder).shards[0]
    assert [sample.label for sample in shard.read(0, 3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"'000000003' has label 3, the index\.json names 3 classes"):
        list(shard.read(2, 2))


def test_shards_without_classes_have_no_labels(make_folder) -> None:
    shard = open_set(make_folder("a", (3,), classes=())).shards[0]
    assert [sample.label for sample in shard.read(0, 3)] == [None] * 3
