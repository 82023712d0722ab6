"""Checking shards: silence only if every byte is right, a line for each thing that is not."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import ShardIndex, ShardInfo, read_index, write_index
from data_prep.check_shards import hash_file, main
from data_prep.make_shards import main as make_shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(12):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    out = tmp_path / "out"
    argv = ["--source", "imagefolder", "--root", str(root), "--out", str(out), "--samples_per_shard", "4"]
    assert run_command(make_shards, [*argv, "--processes", "1"]) == 0
    return out


def test_whole_shards_are_well(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [str(shards)]) == 0
    captured = capsys.readouterr()
    assert f"{shards}: 12 images in 3 shards, all well" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("place", range(0, 10240, 997))
def test_any_flipped_byte_is_found(shards: Path, capsys: pytest.CaptureFixture[str], place: int) -> None:
    path = shards / "shard-00001.tar"
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    assert run_command(main, [str(shards)]) == 2
    captured = capsys.readouterr()
    assert f"{path}: its content is not what was written" in captured.out
    assert "1 of them damaged" in captured.out
    assert captured.err.startswith("error: 1 damaged")


def test_every_damaged_shard_has_its_line(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "shard-00000.tar").unlink()
    with (shards / "shard-00002.tar").open("ab") as file:
        file.write(b"more")
    assert run_command(main, [str(shards), str(shards / "none")]) == 2
    captured = capsys.readouterr()
    assert "shard-00000.tar (4 samples) is damaged: it cannot be opened" in captured.out
    assert "shard-00002.tar (4 samples) is damaged: it has 10244 bytes where" in captured.out
    assert "none holds no index.json" in captured.out
    assert captured.err.startswith("error: 3 damaged")


def test_tars_made_elsewhere_are_listed_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import webdataset

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"part{shard}.tar")) as writer:
            for number in range(3 + shard):
                pixels = np.full((9, 9, 3), number, dtype=np.uint8)
                writer.write({"__key__": f"x{shard}{number}", "png": pixels, "cls": number})
    assert run_command(main, [str(tmp_path)]) == 2
    assert run_command(main, ["--write_index", str(tmp_path)]) == 0
    assert "7 images in 2 shards, all well" in capsys.readouterr().out
    index = read_index(tmp_path)
    assert [shard.samples for shard in index.shards] == [3, 4]
    assert index.classes == ("0", "1", "2", "3")
    before = (tmp_path / "index.json").read_bytes()
    assert run_command(main, ["--write_index", str(tmp_path)]) == 0
    assert (tmp_path / "index.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.offsets")) == ["part0.offsets", "part1.offsets"]


def test_a_damaged_tar_is_not_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    assert run_command(main, ["--write_index", str(tmp_path)]) == 2
    assert "a.tar holds no samples" in capsys.readouterr().err
    assert not (tmp_path / "index.json").exists()


def test_offsets_of_our_own_shards_let_reading_begin_anywhere(shards: Path) -> None:
    from cmae_scale.config.cmae import DataConfig
    from cmae_scale.data.shard_set import open_shards

    assert run_command(main, ["--write_index", str(shards)]) == 0
    found = open_shards(str(shards), data=DataConfig(shards=str(shards))).shards[1]
    keys = [sample.key for sample in found.read(0, 4)]
    assert [sample.key for sample in found.read(2, 2)] == keys[2:]


def rewrite(folder: Path, **members: bytes) -> None:
    """Replace the first shard by other members, with an index that agrees with it in size and hash."""
    import io
    import tarfile

    path = folder / "shard-00000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name.replace("_", "."))
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    index = read_index_without_files(folder)
    info = ShardInfo(path.name, 3, path.stat().st_size, hash_file(path))
    write_index(ShardIndex(folder, (info,), index.classes, 3, index.source, index.options))


def read_index_without_files(folder: Path) -> ShardIndex:
    from cmae_scale.data.index import parse_index

    return parse_index(folder)


def test_faults_of_foreign_shards_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    rewrite(shards, a_jpg=b"text", b_png=png, b_cls=b"2", a_png=png)
    assert run_command(main, [str(shards)]) == 2
    out = capsys.readouterr().out
    assert "sample 'a' is no image that is read here" in out
    assert "sample 'b' has label 2, which no class has" in out
    assert "two samples have the key 'a'" in out
    assert read_index(shards).total == 3


def test_by_path_from_any_folder(repository: Path, shards: Path) -> None:
    script = repository / "data_prep" / "check_shards.py"
    done = subprocess.run(
        [sys.executable, str(script), str(shards)], cwd="/", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
