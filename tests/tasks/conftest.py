"""A small encoder in a folder, labelled shards that can be learned, and the command on fresh ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmae_scale.config.cmae import ConvConfig, ModelConfig, ViewsConfig
from cmae_scale.config.sizes import read_size
from cmae_scale.models.build import build_encoder, init_transformer_
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.weights import export_encoder

MODEL = ModelConfig(embed_dim=32, depth=3, num_heads=2, patch_size=4)
VIEWS = ViewsConfig(img_px=16, master_px=20, shift_px=5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
CLASSES = ("ash", "birch", "cedar")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    encoder = Encoder(read_size(MODEL), patch_size=4, grid=4)
    init_transformer_(encoder)
    for parameter in encoder.parameters():  # no zeros and ones: a mix-up of tensors must show
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("encoder")
    export_encoder(encoder.state_dict(), folder, model=MODEL, views=VIEWS)
    return folder


@pytest.fixture(scope="session")
def hybrid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    conv = ConvConfig(dims=(8, 16), depths=(1, 2), mlp_ratio=2.0)
    model = MODEL.model_copy(update={"conv": conv})
    encoder = build_encoder(model, img_px=16)
    init_transformer_(encoder)
    for parameter in encoder.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("hybrid")
    export_encoder(encoder.state_dict(), folder, model=model, views=VIEWS)
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train (48 images) and val (21) of three classes that differ in colour."""
    from data_prep.make_shards import main

    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 7)):
        for label, name in enumerate(CLASSES):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 160, (20, 24, 3))
                pixels[..., label] += 70
                picture = Image.fromarray(pixels.astype(np.uint8))
                picture.save(folder / "images" / split / name / f"{number}.png")
        source = ["--source", "imagefolder", "--root", str(folder / "images" / split)]
        main([*source, "--out", str(folder / split)])
    return folder


@pytest.fixture
def arguments(shards: Path, encoder_folder: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`arguments({"linear": {}}, "transfer.seed=1", out="run")`: a run of 16 images a step, in fp32."""

    def build(task: dict[str, Any], *overrides: str, out: str = "run", optimizer: str = "AdamW") -> list[str]:
        # eps: see tests/engine/conftest.py
        adam = {"lr": "auto", "weight_decay": 0.05, "eps": 1e-3, "torch_adam": True}
        params = adam if optimizer == "AdamW" else {"lr": "auto", "momentum": 0.9}
        run = {
            "train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": optimizer, "params": params},
            "torch_autocast": {"enabled": False},
            "transfer": {
                "encoder": {"place": str(encoder_folder), "attention": "flash"},
                "task": task,
                "data": {"shards": f"{shards}/train", "val_shards": f"{shards}/val", "workers": 2},
                "crop": {"img_px": 16, "centre": 0.8},
                "schedule": {"base_lr": 0.05, "duration": "4st", "warmup": "1st"},
                "checkpoint": {"every": "2st"},
                "monitor": {"log_every": 1, "evaluate_every": "2st", "batch": 5},
            },
        }
        path = tmp_path / f"{out}.json"
        path.write_text(json.dumps(run))
        settings = ["--set", *overrides] if overrides else []
        return ["--deepspeed_config", str(path), *settings, "--out", str(tmp_path / out)]

    return build


@pytest.fixture
def transfer(on_ranks: Callable[..., list[Any]]) -> Callable[..., list[int]]:
    """Exit statuses of the command on each rank."""

    def run(line: list[str], *, ranks: int = 1) -> list[int]:
        from cmae_scale.transfer import main

        return on_ranks(lambda: main(line), ranks=ranks)

    return run


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def losses_of() -> Callable[[Path], list[float]]:
    return lambda run: [line["loss"] for line in read_lines(run) if "loss" in line]


@pytest.fixture
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    return lambda run: load_file(run / "last" / "model.safetensors")
