"""A folder of whatever people have: every image format gets into the shards and out of them again."""

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from cmae_scale.config.cmae import DataConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.cli import run_command
from cmae_scale.data.decoding import BadSamples, CentreCrops
from cmae_scale.data.image_formats import FORMATS
from cmae_scale.data.index import read_index
from cmae_scale.data.ordered import open_ordered
from cmae_scale.data.shard_set import open_shards
from data_prep.check_shards import main as check_shards
from data_prep.make_shards import main


def encode(number: int, form: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def everything(tmp_path: Path) -> dict[str, bytes]:
    """A file for every ending of every format, in small and capital letters, and two with wrong names."""
    (tmp_path / "in").mkdir()
    files = {}
    endings = [(ending, each.name) for each in FORMATS for ending in each.endings]
    for number, (ending, form) in enumerate([*endings, *((e.upper(), form) for e, form in endings)]):
        files[f"{number}.{ending}"] = encode(number, form)
    files["gif.jpg"], files["png.tif"] = encode(900, "GIF"), encode(901, "PNG")
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    return files


def test_every_file_of_every_format_is_stored_as_it_is_and_decoded(
    everything: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["--source", "flat", "--root", str(tmp_path / "in"), "--out", str(out), "--processes", "1"]
    assert run_command(main, argv) == 0
    assert run_command(check_shards, [str(out)]) == 0
    assert not (out / "skipped.jsonl").exists()
    data = DataConfig(shards=str(out), workers=1)
    shards, bad = open_shards(str(out), data=data), BadSamples(1.0)
    stored = {sample.image for shard in shards.shards for sample in shard.read(0, shard.info.samples)}
    assert stored == set(everything.values())
    crops = CentreCrops(CropConfig(img_px=16), 50.0)
    with open_ordered(shards, decoding=crops, data=data, batch=8, bad=bad) as stream:
        assert sum(len(batch.labels) for batch in stream) == len(everything)
    assert not bad.reasons


def test_stored_images_are_named_by_their_content_as_stock_webdataset_reads_them(
    everything: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = ["--source", "flat", "--root", str(tmp_path / "in"), "--out", str(out), "--processes", "1"]
    assert run_command(main, argv) == 0
    index = read_index(out)
    endings = {each.endings[0] for each in FORMATS}
    read = []
    for sample in webdataset.WebDataset(str(index.path(0)), shardshuffle=False):
        [ending] = endings & sample.keys()
        read.append(sample[ending])
    assert sorted(read) == sorted(everything.values())
