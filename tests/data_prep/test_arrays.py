"""torchvision's arrays as PNG. The archives are made here, so nothing is downloaded."""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.core.cli import run_command
from cmae_scale.data.index import read_index
from cmae_scale.data.tar import read_samples
from data_prep.make_shards import main


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """CIFAR-10's layout with seven images, and checksums that torchvision takes for the right ones."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "downloads" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = {}

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    for split, name, count in (("train", "data_batch_1", 5), ("test", "test_batch", 2)):
        planes = np.random.default_rng(count).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        pixels[split] = planes.transpose(0, 2, 3, 1)
        entry = {"data": planes.reshape(count, -1), "labels": [9 - row for row in range(count)]}
        monkeypatch.setattr(CIFAR10, f"{split}_list", [write(name, entry)])
    names = [f"kind {number}" for number in range(10)]
    file_name, md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": file_name, "key": "label_names", "md5": md5})
    return pixels


def test_pixels_come_back_exactly(tmp_path: Path, cifar10: dict[str, np.ndarray]) -> None:
    argv = ["--source", "cifar10", "--root", str(tmp_path / "downloads"), "--out", str(tmp_path / "out")]
    assert run_command(main, [*argv, "--processes", "1"]) == 0
    for split, pixels in cifar10.items():
        index = read_index(tmp_path / "out" / split)
        assert index.classes[9] == "kind 9"
        shard = index.shards[0]
        samples = list(read_samples(index.path(0), first=0, count=shard.samples, expected=shard))
        decoded = {sample.label: np.asarray(Image.open(io.BytesIO(sample.image))) for sample in samples}
        assert len(decoded) == len(pixels)
        for row, image in enumerate(pixels):
            assert np.array_equal(decoded[9 - row], image)


def test_a_download_that_fails_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    argv = ["--source", "cifar10", "--root", str(tmp_path / "downloads"), "--out", str(tmp_path / "out")]
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --source cifar10 cannot be downloaded")
    assert error.count("\n") == 1
