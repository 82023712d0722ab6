"""Making shards: the bytes are pinned by input, options and seed, however often it is killed on the way."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.offsets import offsets_name
from cmae_scale.data.tar import RawSample
from data_prep.check_shards import main as check_shards
from data_prep.make_shards import main
from tests.data_prep.images import read_all

Make = Callable[..., int]


def picture(number: int, *, width: int = 24, height: int = 20, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of seven files: JPEG, PNG and WebP, all called .jpg."""
    root = tmp_path / "images"
    for number in range(21):
        path = root / "abc"[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, form=["JPEG", "PNG", "WEBP"][number % 3]))
    return root


def make(out: Path, *options: str, source: str = "imagefolder", root: Path | None = None) -> int:
    where = [] if root is None else ["--root", str(root)]
    argv = [
        "--source",
        source,
        *where,
        "--out",
        str(out),
        "--samples_per_shard",
        "4",
        "--processes",
        "1",
        *options,
    ]
    return run_command(main, argv)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of everything in a folder, hidden files too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_original_bytes_are_copied_with_their_labels(images: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "out", root=images) == 0
    samples = read_all(tmp_path / "out")
    index = read_index(tmp_path / "out")
    assert (index.total, index.classes, len(index.shards)) == (21, ("a", "b", "c"), 6)
    assert [sample.key for sample in samples] == [f"{position:09d}" for position in range(21)]
    originals = {path.read_bytes(): "abc".index(path.parent.name) for path in images.rglob("*.jpg")}
    assert {sample.image: sample.label for sample in samples} == originals
    assert [sample.label for sample in samples] != sorted(sample.label or 0 for sample in samples), "shuffled"


def test_stock_webdataset_reads_the_same_samples(images: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", root=images)
    paths = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    stock = webdataset.WebDataset(paths, shardshuffle=False)
    seen = [
        RawSample(
            sample["__key__"],
            next(sample[e] for e in ("jpg", "png", "webp") if e in sample),
            int(sample["cls"]),
        )
        for sample in stock
    ]
    assert seen == read_all(tmp_path / "out")


def test_endings_follow_the_content_and_headers_carry_no_time_or_owner(images: Path, tmp_path: Path) -> None:
    make(tmp_path / "out", root=images)
    endings = set()
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                endings.add(Path(member.name).suffix)
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )
    assert endings == {".jpg", ".png", ".webp", ".cls"}


def test_a_flat_folder_makes_shards_without_labels(images: Path, tmp_path: Path) -> None:
    assert make(tmp_path / "out", source="flat", root=images) == 0
    assert {sample.label for sample in read_all(tmp_path / "out")} == {None}


def test_the_bytes_depend_on_input_and_seed_but_not_on_processes(images: Path, tmp_path: Path) -> None:
    make(tmp_path / "one", root=images)
    make(tmp_path / "two", "--processes", "2", root=images)
    make(tmp_path / "seed", "--seed", "1", root=images)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "seed")


def test_running_again_changes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out", root=images)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert make(tmp_path / "out", root=images) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert "all there already" in capsys.readouterr().out


def test_a_shard_that_was_lost_is_made_again_and_only_that(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, root=images)
    whole = contents(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    (out / "shard-00002.tar").unlink()
    assert make(out, root=images) == 0
    assert contents(out) == whole
    changed = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"shard-00002.tar"}


@pytest.mark.parametrize(
    "options", [("--seed", "1"), ("--samples_per_shard", "5"), ("--resize_short", "8"), ("--limit", "9")]
)
def test_other_options_into_the_same_folder_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    out = tmp_path / "out"
    make(out, root=images)
    before = contents(out)
    assert make(out, *options, root=images) == 2
    error = capsys.readouterr().err
    assert f"{options[0][2:]} " in error
    assert f"(now {options[1]})" in error
    assert error.count("\n") == 1
    assert contents(out) == before


def test_other_images_into_the_same_folder_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out", root=images)
    (images / "a" / "0.jpg").rename(images / "a" / "zero.jpg")
    assert make(tmp_path / "out", root=images) == 2
    (images / "a" / "new.jpg").write_bytes(picture(99))
    assert make(tmp_path / "out", root=images) == 2
    assert capsys.readouterr().err.count("the images are not those that") == 2


def test_two_at_once_in_one_folder_are_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / ".making-1-of-1.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert make(out, root=images) == 2
    assert "another make_shards is writing" in capsys.readouterr().err
    assert make(out, root=images) == 0


def test_tars_of_others_are_not_overwritten(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "shard-00000.tar").write_bytes(b"precious")
    assert make(out, root=images) == 2
    assert "holds tar files of unknown origin" in capsys.readouterr().err
    assert contents(out).keys() == {"shard-00000.tar"}


def test_a_damaged_index_is_not_continued(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out", root=images)
    (tmp_path / "out" / "index.json").write_text("{")
    assert make(tmp_path / "out", root=images) == 2
    assert "index.json is not JSON" in capsys.readouterr().err


BAD = [b"", b"not an image", b"\xff\xd8\xff\xe0", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(60)]


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_is_no_image_stops_with_its_name_and_the_remedy(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (images / "b" / "bad.jpg").write_bytes(content)
    assert make(tmp_path / "out", root=images) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: b/bad.jpg: ")
    assert "--skip_bad" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_skipping_bad_files_goes_on_from_what_was_finished_before(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: str
) -> None:
    for number, content in enumerate(BAD):
        (images / "b" / f"bad{number}.jpg").write_bytes(content)
    assert make(tmp_path / "out", "--processes", processes, root=images) == 2
    assert make(tmp_path / "out", "--skip_bad", "--processes", processes, root=images) == 0
    assert capsys.readouterr().err.count("skipped b/bad") == len(BAD)
    assert len(read_all(tmp_path / "out")) == 21
    make(tmp_path / "fresh", "--skip_bad", root=images)
    assert contents(tmp_path / "fresh") == contents(tmp_path / "out")


def test_where_samples_begin_is_noted_as_check_shards_notes_it(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(out, "--samples_per_shard", "7", root=images) == 0
    made = contents(out)
    assert sum(name.endswith(".offsets") for name in made) == len(read_index(out).shards) > 1
    for path in out.glob("*.offsets"):
        path.unlink()
    assert run_command(check_shards, ["--write_index", str(out)]) == 0
    assert contents(out) == made


def test_a_shard_of_nothing_but_bad_files_is_left_out(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(picture(1) if name == "2" else b"bad")
    options = ("--skip_bad", "--samples_per_shard", "1")
    assert make(tmp_path / "out", *options, source="flat", root=tmp_path / "images") == 0
    only = read_index(tmp_path / "out").shards[0].name
    assert contents(tmp_path / "out").keys() == {only, offsets_name(only), "index.json", "skipped.jsonl"}
    assert make(tmp_path / "out", *options, source="flat", root=tmp_path / "images") == 0
    assert len(read_all(tmp_path / "out")) == 1


def test_nothing_but_bad_files_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"bad")
    assert make(tmp_path / "out", "--skip_bad", source="flat", root=tmp_path / "images") == 2
    assert "can be used as an image" in capsys.readouterr().err


def test_resizing_touches_only_images_whose_short_side_is_longer(tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    originals = [
        picture(1, width=60, height=40),
        picture(2, width=16, height=99),
        picture(3, width=99, height=17),
    ]
    for number, data in enumerate(originals):
        (root / f"{number}.png").write_bytes(data)
    assert make(tmp_path / "out", "--resize_short", "16", "--quality", "80", source="flat", root=root) == 0
    samples = {sample.image for sample in read_all(tmp_path / "out")}
    assert originals[1] in samples
    sizes = {Image.open(io.BytesIO(image)).size for image in samples}
    assert sizes == {(24, 16), (16, 99), (93, 16)}


def test_the_limit_takes_a_mixture_of_classes(images: Path, tmp_path: Path) -> None:
    make(tmp_path / "all", root=images)
    make(tmp_path / "few", "--limit", "9", root=images)
    few = read_all(tmp_path / "few")
    assert few == read_all(tmp_path / "all")[:9]
    assert {sample.label for sample in few} == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--source", "imagefolder"], "needs --root"),
        (["--source", "flat", "--root", "/nowhere/at/all"], "--root /nowhere/at/all is not a folder"),
        (["--source", "digits", "--out", "/dev/null/out"], "/dev/null/out/train: Not a directory"),
        (["--source", "digits", "--quality", "80"], "--quality needs --resize_short"),
    ],
)
def test_mistakes_are_one_sentence_and_status_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_command(main, ["--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


UNENDING = """
import os, sys, threading

def watch(event, arguments):
    if event == "open" and "index.json" in str(arguments[0]) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        threading.Event().wait(600)  # not for ever, should nobody be left to end it

sys.addaudithook(watch)
from data_prep.make_shards import run
sys.exit(run())
"""


def start_unending(repository: Path, *argv: str) -> "subprocess.Popen[bytes]":
    """The command in a process group of its own, where it waits before it writes the index."""
    return subprocess.Popen(
        [sys.executable, "-c", UNENDING, *argv],
        start_new_session=True,
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(400):
        (root / f"{number}.png").write_bytes(picture(number))
    make(tmp_path / "whole", "--samples_per_shard", "5", source="flat", root=root)
    whole = contents(tmp_path / "whole")
    out = tmp_path / "out"
    argv = ["--source", "flat", "--root", str(root), "--out", str(out), "--samples_per_shard", "5"]
    for shards in (0, 3, 20, 40, 60):  # of 80 are there when it is killed
        process = start_unending(repository, *argv, "--processes", "2")
        while process.poll() is None and len(list(out.glob("*.tar"))) < shards:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for path in out.glob("*.tar"):
            assert contents(out)[path.name] == whole[path.name], "a shard appears only whole"
    assert run_command(main, [*argv, "--processes", "2"]) == 0
    assert contents(out) == whole


def test_interrupted_it_ends_without_a_traceback_and_continues(repository: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    for number in range(500):
        (root / f"{number}.png").write_bytes(picture(number))
    argv = ["--source", "flat", "--root", str(root), "--out", str(out), "--samples_per_shard", "2"]
    process = start_unending(repository, *argv, "--processes", "2")
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, b"")
    assert not list(out.glob(".*.part"))
    assert run_command(main, argv) == 0
    assert read_index(out).total == 500


def test_awkward_real_files_are_kept_as_they_are(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "oddities.tar") as tar:
        tar.extractall(tmp_path / "images", filter="data")
    assert make(tmp_path / "out", source="flat", root=tmp_path / "images") == 0
    originals = {path.read_bytes() for path in (tmp_path / "images").glob("*.jpg")}
    assert {sample.image for sample in read_all(tmp_path / "out")} == originals
    assert len(originals) == 10


def test_digits_by_module_as_the_readme_says(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "data_prep.make_shards",
        "--source",
        "digits",
        "--out",
        str(tmp_path / "digits"),
    ]
    done = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert "1,438 images, 10 classes" in lines[0]
    assert "png 1,438; short side 32 to 32 px, median 32" in lines[1]
    assert "359 images, 10 classes" in lines[2]
    options = json.loads((tmp_path / "digits" / "val" / "index.json").read_text())["options"]
    assert options["source"] == "digits"
    samples = read_all(tmp_path / "digits" / "val")
    assert Image.open(io.BytesIO(samples[0].image)).size == (32, 32)
