"""Sharing the work: parts, processes and Ray fill one folder with the same bytes, whoever does what when."""

import fcntl
import hashlib
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_first
from cmae_scale.data.index import read_index
from data_prep.layout import Part
from data_prep.locks import hold_merge, hold_part
from data_prep.make_shards import main
from data_prep.manifest import OPTIONS_NAME
from tests.data_prep.images import picture

COUNT = 60


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixty files: two are no images, two are small, and each tenth is the one before it again."""
    root = tmp_path / "images"
    for number in range(COUNT):
        path = root / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number - (number % 10 == 9)))
    (root / "a" / "3.png").write_bytes(b"bad")
    (root / "b" / "4.png").write_bytes(b"bad too")
    for name in ("a/6.png", "b/7.png"):
        Image.new("L", (4, 40)).save(root / name)
    return root


def build_argv(root: Path, out: Path, *options: str) -> list[str]:
    argv = ["--source", "imagefolder", "--root", str(root), "--out", str(out), "--samples_per_shard", "5"]
    return [*argv, "--skip_bad", "--min_side_px", "8", "--processes", "1", *options]


def make(root: Path, out: Path, *options: str) -> int:
    return run_command(main, build_argv(root, out, *options))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("parts", [2, 3, 5, 12, 17])
@pytest.mark.parametrize("dedup", [(), ("--dedup",)])
def test_parts_in_any_order_give_the_bytes_of_one_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], parts: int, dedup: Sequence[str]
) -> None:
    assert make(images, tmp_path / "whole", *dedup) == 0
    order = list(range(1, parts + 1))
    random.Random(parts).shuffle(order)
    out = tmp_path / "out"
    for part in order:
        assert not (out / "index.json").exists() or parts > 12, "some of 17 parts have no shard of the 12"
        assert make(images, out, "--part", f"{part}/{parts}", *dedup) == 0
    assert contents(out) == contents(tmp_path / "whole")
    if parts == 2:
        assert f"part {order[0]}/2 done" in capsys.readouterr().out


def test_a_part_can_be_run_again_before_and_after_the_others(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(images, tmp_path / "whole")
    for part in ("1/2", "1/2", "2/2", "1/2", "2/2"):
        assert make(images, out, "--part", part) == 0
    (out / "shard-00003.tar").unlink()
    assert make(images, out, "--part", "1/2") == 0
    assert not (out / "shard-00003.tar").exists(), "it belongs to the other part"
    assert make(images, out, "--part", "2/2") == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_another_number_of_parts_may_finish_what_was_begun(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "whole")
    assert make(images, tmp_path / "out", "--part", "2/3") == 0
    assert make(images, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_at_the_same_time_meet_in_one_index(repository: Path, images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "whole", "--dedup")
    out = tmp_path / "out"
    script = str(repository / "data_prep" / "make_shards.py")
    running = [
        subprocess.Popen(
            [sys.executable, script, *build_argv(images, out, "--dedup", "--part", f"{part}/4")],
            stderr=subprocess.PIPE,
        )
        for part in range(1, 5)
    ]
    assert [(process.communicate()[1], process.returncode)[1] for process in running] == [0] * 4
    assert contents(out) == contents(tmp_path / "whole")


def test_many_at_once_agree_on_who_began(tmp_path: Path) -> None:
    wins = []
    barrier = threading.Barrier(8)

    def write(content: bytes) -> None:
        barrier.wait()
        wins.append((write_first(tmp_path / OPTIONS_NAME, content), content))

    threads = [threading.Thread(target=write, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content for won, content in wins if won] == [(tmp_path / OPTIONS_NAME).read_bytes()]
    assert [path.name for path in tmp_path.iterdir()] == [OPTIONS_NAME]


def test_one_part_at_work_excludes_itself_and_other_splits_of_the_work(tmp_path: Path) -> None:
    with hold_part(tmp_path, Part(2, 3)):
        with hold_part(tmp_path, Part(1, 3)):
            pass
        with (
            pytest.raises(
                ConfigError, match=r"is writing part 2/3 of .*: wait for it or write another --out"
            ),
            hold_part(tmp_path, Part(2, 3)),
        ):
            pass
        for other in (Part(1, 1), Part(2, 4)):
            with pytest.raises(ConfigError, match="the same number of parts"), hold_part(tmp_path, other):
                pass
    with hold_part(tmp_path, Part(2, 4)):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    (tmp_path / ".making-1-of-2.lock").touch()
    with hold_part(tmp_path, Part(1, 1)), hold_merge(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_where_the_file_system_has_no_locks_work_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int, flags: int) -> None:
        raise OSError(37, "No locks available")

    make(images, tmp_path / "whole")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(images, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_part_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--source", "digits", "--out", str(tmp_path), f"--part={text}"])
    assert status.value.code == 2
    assert "is not I/N with I from 1 to N" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert make(images, out, "--dry_run") == 0
    assert not out.exists()
    assert (
        "60 images, 3 classes, 12 shards; this run would write 60 images in 12 shards"
        in capsys.readouterr().out
    )
    make(images, out, "--part", "1/3")
    before = contents(out)
    assert make(images, out, "--dry_run", "--part", "2/3") == 0
    assert make(images, out, "--dry_run") == 0
    assert contents(out) == before
    said = capsys.readouterr().out
    assert "would write 20 images in 4 shards" in said
    assert "would write 40 images in 8 shards" in said


@pytest.mark.slow
def test_ray_writes_the_same_bytes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    make(images, tmp_path / "whole", "--dedup")
    assert make(images, tmp_path / "out", "--dedup", "--executor", "ray") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    argv = [
        option
        for option in build_argv(images, tmp_path / "bad", "--executor", "ray")
        if option != "--skip_bad"
    ]
    assert run_command(main, argv) == 2
    assert "--skip_bad leaves it out" in capsys.readouterr().err.splitlines()[-1]
    assert read_index(tmp_path / "out").total == 52 - 2
