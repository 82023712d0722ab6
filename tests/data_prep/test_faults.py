"""Killed or out of disk at any step of its file work, the command goes on and ends with the same bytes."""

import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cmae_scale.core.cli import run_command
from cmae_scale.core.files import PART
from data_prep.make_shards import main
from tests.data_prep.images import picture

STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}  # as sys.audit calls them
WRITING = {"open", "os.rename", "os.link", "os.mkdir"}  # what a full disk refuses
KILLED = 9
TOLD = 2


def write_images(root: Path) -> list[str]:
    root.mkdir()
    for number in range(11):
        (root / f"{number}.png").write_bytes(b"bad" if number == 5 else picture(number % 8))
    return ["--source", "flat", "--root", str(root)]


def write_parquet(root: Path) -> list[str]:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'datasets'")
    from pyarrow import parquet

    root.mkdir()
    images = [b"bad" if number == 5 else picture(number % 8) for number in range(11)]
    parquet.write_table(pyarrow.table({"image": images}), root / "a.parquet", row_group_size=2)
    return ["--source", "huggingface", "--root", str(root)]


@pytest.fixture(params=[write_images, write_parquet])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    write: Callable[[Path], list[str]] = request.param
    return write(tmp_path / "images")


def build_argv(source: list[str], out: Path) -> list[str]:
    options = ["--samples_per_shard", "4", "--processes", "1", "--dedup", "--skip_bad"]
    return [*source, "--out", str(out), *options]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def run_with_fault(
    argv: list[str], out: Path, *, step: int, strike: Callable[[], None], steps: set[str]
) -> int:
    """Exit status of the command in a forked process where the `step`-th work on a file of `out` strikes."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        left = step

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in steps and str(arguments[0]).startswith(f"{out}/"):
                if event == "open" and not int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR):
                    return
                left -= 1
                if left == -1:
                    strike()

        sys.addaudithook(watch)
        os._exit(run_command(main, argv))
    finally:
        os._exit(1)


def die() -> None:
    os._exit(KILLED)


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_the_next_run_ends_with_the_same_bytes(
    source: list[str], tmp_path: Path, stride: int
) -> None:
    assert run_command(main, build_argv(source, tmp_path / "whole")) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 8, "three shards and where their samples begin, skipped.jsonl and the index"
    for step in range(0, 1000, stride):
        out = tmp_path / str(step)
        argv = build_argv(source, out)
        status = run_with_fault(argv, out, step=step, strike=die, steps=STEPS)
        if status == 0:
            break
        assert status == KILLED
        if (out / "index.json").exists():
            assert whole.items() <= contents(out).items(), "from the index on, the data set is whole"
        assert run_command(main, argv) == 0
        assert contents(out) == whole
    assert step > 30


def test_killed_again_and_again_it_gets_there(source: list[str], tmp_path: Path) -> None:
    assert run_command(main, build_argv(source, tmp_path / "whole")) == 0
    argv = build_argv(source, tmp_path / "out")
    statuses = [
        run_with_fault(argv, tmp_path / "out", step=step, strike=die, steps=STEPS) for step in range(3, 99, 8)
    ]
    assert set(statuses) == {KILLED, 0}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_step_is_told_and_leaves_no_parts(
    source: list[str], tmp_path: Path, stride: int
) -> None:
    assert run_command(main, build_argv(source, tmp_path / "whole")) == 0
    whole = contents(tmp_path / "whole")
    for step in range(0, 1000, stride):
        out = tmp_path / str(step)
        argv = build_argv(source, out)
        status = run_with_fault(argv, out, step=step, strike=refuse, steps=WRITING)
        if status == 0:
            break
        assert status == TOLD
        assert not list(out.glob(f".shard*{PART}")), "what fills a disk must not stay there"
        assert run_command(main, argv) == 0
        assert contents(out) == whole
    assert step > 20


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_file_that_the_kernel_cuts_short_is_one_sentence(
    repository: Path, tmp_path: Path, processes: str
) -> None:
    """A limit on file sizes is the full disk that a test can have: write() itself fails in mid-shard."""
    argv = [*build_argv(write_images(tmp_path / "images"), tmp_path / "out"), "--processes", processes]
    script = str(repository / "data_prep" / "make_shards.py")
    done = subprocess.run(
        [sys.executable, "-B", script, *argv],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == TOLD
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large (mend it, then the same command goes on)" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".making.json"}
    assert run_command(main, argv) == 0
    assert run_command(main, build_argv(argv[:4], tmp_path / "whole")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
