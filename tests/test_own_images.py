"""The README's way for one's own images, word for word: from an unsplit folder to what its neighbours say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae_scale.core.world import find_free_port
from cmae_scale.data.index import read_index

HUES = {"café": (200, 40, 40), "meadow": (40, 180, 60), "sea": (40, 60, 200)}
COUNT = 80  # images of each class


def fill(root: Path) -> None:
    """A folder as people have it: several formats and sizes, and what systems leave between the images."""
    for name, hue in HUES.items():
        (root / name).mkdir(parents=True)
        for number in range(COUNT):
            rng = np.random.default_rng([number, *hue])
            noise = rng.normal(0, 25, (40 + number % 9, 52, 3))
            image = Image.fromarray((np.array(hue) + noise).clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{number}.{('jpg', 'png', 'bmp', 'tif')[number % 4]}")
    for clutter in ("Thumbs.db", "café/.DS_Store", "sea/notes.txt", "__MACOSX/sea/._1.jpg"):
        (root / clutter).parent.mkdir(parents=True, exist_ok=True)
        (root / clutter).write_bytes(b"no image")


def read_commands(repository: Path) -> str:
    readme = (repository / "README.md").read_text()
    block = re.search(r"## Your own images\n.*?\n```\n(.*?)```", readme, flags=re.DOTALL)
    assert block is not None
    return block[1]


@pytest.mark.slow
def test_from_an_unsplit_folder_to_neighbours_as_the_readme_says(repository: Path, tmp_path: Path) -> None:
    fill(tmp_path / "images")
    for name in ("data_prep", "cmae_scale", "ds_configs"):
        (tmp_path / name).symlink_to(repository / name)
    prelude = f'set -e; deepspeed() {{ command deepspeed --master_port {find_free_port()} "$@"; }}\n'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", prelude + read_commands(repository)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    train, val = (read_index(tmp_path / "shards" / "mine" / split) for split in ("train", "val"))
    assert train.total + val.total == len(HUES) * COUNT
    assert train.classes == val.classes == tuple(sorted(HUES))
    assert "not listed 4: " in done.stdout
    assert (tmp_path / "runs" / "mine" / "encoder" / "model.safetensors").exists()
    results = json.loads((tmp_path / "runs" / "mine_knn" / "results.json").read_text())
    assert results["knn_images"] == val.total
    assert results["knn_top1"] > 0.8, "three colours"
