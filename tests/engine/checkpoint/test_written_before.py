"""Checkpoints of earlier versions go on: two of them are kept here as they were written.

They are of step 2 of tiny runs, in fp32 without ZeRO and in a bf16 engine at ZeRO-1, written before modules
and classes got other names; beside each are the five losses of the run that went on at once.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WRITTEN = Path(__file__).parent / "written_before"
MODEL = {
    "model": {
        "embed_dim": 16,
        "depth": 1,
        "pixel_decoder": {"depth": 1, "embed_dim": 8, "num_heads": 2},
        "feature_decoder": {"depth": 1, "embed_dim": 8, "num_heads": 2},
    },
    "heads": {"hidden_dim": 16, "out_dim": 8},
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "stage", "more", "tolerance"),
    [
        ("fp32", 0, {}, 1e-5),  # what another CPU's order of sums may change
        ("bf16", 1, {"bf16": {"enabled": True}}, 1e-2),
    ],
)
def test_an_earlier_checkpoint_goes_on(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    name: str,
    stage: int,
    more: dict[str, Any],
    tolerance: float,
) -> None:
    run = tiny_run(stage=stage, cmae=MODEL, **more)
    shutil.copytree(WRITTEN / name / "checkpoints", run.out / "checkpoints")
    taken_up = on_ranks(lambda: train_tiny(run, steps=2), ranks=1)[0]
    assert taken_up["first_step"] == 2
    stored = load_file(WRITTEN / name / "checkpoints" / "step_00000002" / "rank_00000.safetensors")
    for key, value in taken_up["weights"].items():
        is_buffer = f"buffer/{key}" in stored
        expected = stored[f"buffer/{key}" if is_buffer else f"weight/{key}@0"]
        if more and key.startswith("target_") and not is_buffer:  # the model runs on bf16 copies of these
            expected = expected.bfloat16()
        assert torch.equal(value, expected.reshape(value.shape).to(value.dtype)), key
    losses = json.loads((WRITTEN / name / "losses.json").read_text())["losses"]
    went_on = on_ranks(lambda: train_tiny(run, steps=5), ranks=1)[0]["losses"]
    assert sorted(went_on) == [2, 3, 4]
    for step, got in went_on.items():
        torch.testing.assert_close(got, torch.tensor(losses[str(step)]), rtol=tolerance, atol=0)
