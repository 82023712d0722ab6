"""The commands that measure the loader and prove its order, on a handful of images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.bench import main
from cmae_scale.benchmarks.loader_memory import measure_footprint
from cmae_scale.config.cmae import DataConfig, ViewsConfig
from data_prep.make_shards import main as make_shards


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG")
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return tmp_path / "images"


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> str:
    out = str(tmp_path / "shards")
    make_shards(["--source", "imagefolder", "--root", str(images), "--out", out, "--samples_per_shard", "10"])
    return out


def test_every_world_gets_the_same_global_batches(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--shards", shards, "--batch", "8", "--master_px", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()[-10:]
    assert lines[-1] == "identical in all 9 worlds"
    assert lines[0].startswith("1 ranks x 1 workers  ")
    first, second = lines[0].split("  ")[1:]
    assert first.endswith("(40 samples)")
    assert first.split()[0] != second.split()[0], "two epochs are not alike"


def test_worlds_that_differ_are_an_error(
    shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter("abcdefghijklmnopqr")
    monkeypatch.setattr("cmae_scale.benchmarks.proof.digest_epochs", lambda *_, **__: [(next(digests), 40)])
    assert main(["stream", "--shards", shards, "--batch", "8", "--master_px", "32"]) == 2
    assert "the global batches differ" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_race_reports_all_contestants_and_writes_a_record(
    shards: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "records" / "loader.json"
    argv = ["loader", "--shards", shards, "--folder", str(images), "--samples", "16", "--rounds", "2"]
    argv += ["--master_px", "32"]
    assert main([*argv, "--batch", "8", "--workers", "1", "--epochs", "3", "--record", str(record)]) == 0
    content = json.loads(record.read_text())
    assert set(content) == {"commit", "hardware", "versions", "config", "results"}
    assert len(content["results"]) == 4
    for result in content["results"].values():
        spread = result["cpu_s_per_sample"]
        assert spread["n"] == 2
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert content["results"]["ours"]["times_ours"] == 1
    assert len(content["results"]["ours"]["resident_mib"]) == 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_epochs(shards: str) -> None:
    data = DataConfig(shards=shards, workers=2)
    views = ViewsConfig(img_px=32, master_px=32, shift_px=0)
    resident = measure_footprint(data, views=views, batch=8, epochs=60)
    assert len(resident) == 60
    assert max(resident[30:]) < max(resident[5:30]) * 1.01


def test_making_shards_is_measured_beside_decoding(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "shards.json"
    argv = ["shards", "--folder", str(images), "--rounds", "2", "--record", str(record)]
    assert main([*argv, "--scratch", str(tmp_path)]) == 0
    results = json.loads(record.read_text())["results"]
    assert results.keys() == {"copy and hash", "make_shards", "decode"}
    assert all(result["wall_s_per_image"]["min"] > 0 for result in results.values())
    assert "times as fast as decoding" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"images", "shards.json"}, "nothing is left behind"
    assert main(["shards", "--folder", str(tmp_path / "nothing")]) == 2
    assert "holds no class folders" in capsys.readouterr().err
