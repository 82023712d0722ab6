"""Adding to finished shards: by --append, or by a tar that is copied beside them."""

import json
import shutil
from pathlib import Path

import pytest

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.check_shards import main as check_shards
from data_prep.make_shards import main
from data_prep.manifest import STAGING_NAME
from tests.data_prep.images import picture


def add(root: Path, label: str, *numbers: int) -> None:
    (root / label).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (root / label / f"{number}.png").write_bytes(picture(number))


def make(root: Path, out: Path, *options: str) -> int:
    argv = ["--source", "imagefolder", "--root", str(root), "--out", str(out), "--processes", "1"]
    return run_command(main, [*argv, "--samples_per_shard", "4", *options])


def read_names(folder: Path) -> dict[bytes, str]:
    """The class of each image of a folder, by name."""
    index = read_index(folder)
    samples = [
        sample
        for number, shard in enumerate(index.shards)
        for sample in read_samples(index.path(number), first=0, count=shard.samples, expected=shard)
    ]
    assert len({sample.image for sample in samples}) == len(samples)
    return {sample.image: index.classes[sample.label or 0] for sample in samples}


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    add(tmp_path / "in", "cat", *range(5))
    add(tmp_path / "in", "dog", *range(5, 10))
    return tmp_path / "in"


def test_new_images_get_shards_of_their_own_and_the_old_ones_stay(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert make(root, out) == 0
    before, old = tars(out), read_index(out)
    add(root, "ant", 10, 11)  # before cat and dog in sorted order
    add(root, "dog", 12, 13, 14)
    assert make(root, out, "--append") == 0
    assert "5 images are new, 10 were there already; now 15 images in 5 shards" in capsys.readouterr().out
    index = read_index(out)
    assert index.classes == ("cat", "dog", "ant")
    assert index.shards[: len(old.shards)] == old.shards
    assert {name: data for name, data in tars(out).items() if name in before} == before
    expected = {picture(n): label for label in ("cat", "dog", "ant") for n in _numbers(root / label)}
    assert read_names(out) == expected
    assert run_command(check_shards, [str(out)]) == 0
    assert not (out / STAGING_NAME).exists()


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.iterdir()]


def test_what_is_there_already_is_added_under_no_name_and_told(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(root, out) == 0
    before = tars(out)
    shutil.copy(root / "cat" / "0.png", root / "cat" / "again.png")
    assert make(root, out, "--append") == 0
    assert tars(out) == before
    add(root, "cat", 20)
    shutil.copy(root / "cat" / "20.png", root / "cat" / "20_again.png")
    assert make(root, out, "--append") == 0
    assert len(read_names(out)) == 11
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} >= {"cat/0.png", "cat/again.png", "cat/20_again.png"}


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert make(root, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    add(root, "cat", 20, 21)
    assert make(root, out, "--append", "--dry_run") == 0
    assert "this run would write 2 images in 1 shards" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_rows_of_a_table_are_added_to_images_of_a_folder(root: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "out"
    assert make(root, out) == 0
    table = pyarrow.table({"image": [picture(3), picture(30)], "label": ["cat", "owl"]})
    parquet.write_table(table, tmp_path / "more.parquet")
    argv = ["--source", "huggingface", "--root", str(tmp_path / "more.parquet"), "--out", str(out)]
    assert run_command(main, [*argv, "--processes", "1", "--append"]) == 0
    assert read_names(out)[picture(30)] == "owl"
    assert len(read_names(out)) == 11


def test_the_command_that_made_the_folder_still_goes_on_with_it(root: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    shutil.copytree(root, first)
    assert make(first, out) == 0
    add(root, "ant", 10, 11)
    assert make(root, out, "--append", "--skip_bad") == 0
    whole = tars(out), (out / "index.json").read_bytes()
    (out / "shard-00001.tar").unlink()
    assert make(first, out) == 0
    assert read_names(out).keys() == {picture(number) for number in range(12)}
    assert (tars(out), json.loads((out / "index.json").read_bytes())["shards"]) == (
        whole[0],
        json.loads(whole[1])["shards"],
    )


@pytest.mark.parametrize("moved", [0, 1])
def test_killed_while_it_moves_shards_the_same_command_ends_the_same(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moved: int,
) -> None:
    out, sure = tmp_path / "out", tmp_path / "sure"
    assert make(root, out) == 0
    shutil.copytree(out, sure)
    add(root, "dog", *range(20, 28))
    assert make(root, sure, "--append") == 0
    real = Path.replace
    calls = 0

    def replace(path: Path, target: Path) -> Path:
        nonlocal calls
        if path.parent.name == STAGING_NAME and path.suffix == ".tar":
            calls += 1
            if calls > moved:
                raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        main(_argv(root, out))
    monkeypatch.undo()
    assert run_command(check_shards, ["--write_index", str(out)]) == 2
    assert "is not finished" in capsys.readouterr().err
    run_command(check_shards, [str(out)])
    assert (
        "adding images to it was not finished: run the command with --append again" in capsys.readouterr().out
    )
    assert make(root, out, "--append") == 0
    assert tars(out) == tars(sure)
    assert (out / "index.json").read_bytes() == (sure / "index.json").read_bytes()


def _argv(root: Path, out: Path) -> list[str]:
    options = ["--processes", "1", "--samples_per_shard", "4", "--append"]
    return ["--source", "imagefolder", "--root", str(root), "--out", str(out), *options]


def test_shards_of_another_size_are_not_added_to(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(root, tmp_path / "out", "--resize_short", "8") == 0
    assert make(root, tmp_path / "out", "--append") == 2
    assert "was made with --resize_short 8, not None" in capsys.readouterr().err
    assert make(root, tmp_path / "none", "--append") == 2
    assert "holds no index.json to add to: leave out --append" in capsys.readouterr().err
    assert make(root, tmp_path / "out", "--append", "--part", "1/2") == 2
