"""Files that once broke something, as they were met: each ends well or in one sentence, with flat memory."""

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmae_scale.config.cmae import DataConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.cli import run_command
from cmae_scale.data.decoding import BadSamples, CentreCrops
from cmae_scale.data.index import read_index
from cmae_scale.data.ordered import open_ordered
from cmae_scale.data.shard_set import open_shards
from data_prep.check_shards import main as check_shards
from data_prep.make_shards import main as make_shards

MAX_BYTES = 64 << 20  # of Python's own memory
NUMBERS_NO_CLASS = "make_shards --source webdataset, which numbers labels anew"
NO_NUMBER = "is damaged: the label of sample"


@pytest.fixture
def cases(shared_data: Path) -> Path:
    folder = shared_data.parent / "cases"
    if not folder.is_dir():
        pytest.skip("../shared/cases is not there")
    return folder


@pytest.fixture(autouse=True)
def flat_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("label_1e9", NUMBERS_NO_CLASS),
        ("label_999999999", NUMBERS_NO_CLASS),
        ("label_2p63", NO_NUMBER),
        ("label_5000_digits", NO_NUMBER),
        ("neg_size_loop", "gives no size"),
        ("neg_size_back_grows", "gives no size"),
        ("neg_size_traceback", "gives no size"),
        ("pax_length_5000_digits", "it holds a malformed pax record"),
    ],
)
def test_what_cannot_be_listed_is_one_sentence(
    cases: Path, tmp_path: Path, case: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cases / case, tmp_path / "in", copy_function=shutil.copyfile)
    (tmp_path / "in").chmod(0o755)
    assert run_command(check_shards, ["--write_index", str(tmp_path / "in")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("case", "classes"),
    [
        ("label_1e9", ("1000000000",)),
        ("label_999999999", ("999999999",)),
        ("label_2p63", None),
        ("label_5000_digits", None),
        ("neg_size_loop", None),
        ("pax_length_5000_digits", None),
    ],
)
def test_what_is_packed_anew_keeps_ids_or_is_one_sentence(
    cases: Path,
    tmp_path: Path,
    case: str,
    classes: tuple[str, ...] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--source", "webdataset", "--root", str(cases / case), "--out", str(tmp_path), "--processes", "1"]
    status = run_command(make_shards, argv)
    if classes is None:
        assert (status, capsys.readouterr().err.count("error: ")) == (2, 1)
    else:
        assert status == 0
        assert classes[0] in read_index(tmp_path).classes
        assert len(read_index(tmp_path).classes) < 20


def test_an_image_without_height_is_counted_and_named_and_the_others_are_read(
    cases: Path, tmp_path: Path
) -> None:
    shutil.copyfile(cases / "jpeg_zero_height" / "a.tar", tmp_path / "a.tar")
    assert run_command(check_shards, ["--write_index", str(tmp_path)]) == 0
    data = DataConfig(shards=str(tmp_path), workers=1)
    shards, bad = open_shards(str(tmp_path), data=data), BadSamples(1.0)
    crops = CentreCrops(CropConfig(img_px=16), 50.0)
    with open_ordered(shards, decoding=crops, data=data, batch=50, bad=bad) as stream:
        read = sum(len(batch.labels) for batch in stream)
    assert read == shards.total == 300
    assert len(bad.reasons) == 1
