"""Neighbours while pre-training: what the last line of metrics says is what the exported encoder gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.dist

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
DECODER = {"depth": 1, "embed_dim": 16, "num_heads": 2}
CONV = {"conv": {"dims": [8, 16], "depths": [1, 1], "mlp_ratio": 2.0}}


@pytest.fixture
def pretraining(shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a pre-training of 4 steps, whose neighbours are asked after every 2."""

    def write(**model: Any) -> list[str]:
        run = {
            "train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
            "cmae": {
                "model": {**MODEL, **model, "pixel_decoder": DECODER, "feature_decoder": DECODER},
                "heads": {"hidden_dim": 32, "out_dim": 16},
                "mask": {"cell": 1},
                "views": {"img_px": 16, "master_px": 20, "shift_px": 5},
                "data": {"shards": f"{shards}/train", "val_shards": f"{shards}/val", "workers": 1},
                "schedule": {"base_lr": 0.01, "duration": "4st", "warmup": "1st"},
                "monitor": {"log_every": 1, "knn": {"every": "2st", "k": 5, "batch": 7}},
            },
        }
        path = tmp_path / "pretrain.json"
        path.write_text(json.dumps(run))
        return ["--deepspeed_config", str(path), "--out", str(tmp_path / "pretrained")]

    return write


@pytest.mark.slow_unless(model={})
@pytest.mark.parametrize("model", [{}, CONV], ids=["transformer", "hybrid"])
def test_the_monitor_says_what_the_command_says_of_the_exported_encoder(
    pretraining: Callable[..., list[str]],
    arguments: Callable[..., list[str]],
    transfer: Callable[..., list[int]],
    on_ranks: Callable[..., list[Any]],
    tmp_path: Path,
    model: dict[str, Any],
) -> None:
    from cmae_scale.pretrain import main

    line = pretraining(**model)
    assert on_ranks(lambda: main(line), ranks=2) == [0, 0]
    lines = [
        json.loads(text) for text in (tmp_path / "pretrained" / "metrics.jsonl").read_text().splitlines()
    ]
    said = [line for line in lines if "knn_top1" in line]
    assert [line["step"] for line in said] == [2, 4]
    place = f"transfer.encoder.place={tmp_path / 'pretrained' / 'encoder'}"
    assert transfer(arguments({"knn": {"k": 5}}, place)) == [0]
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: said[-1][name] for name in found if name.startswith("knn_")} == {
        name: value for name, value in found.items() if name.startswith("knn_")
    }
