"""A run that starts from weights which exist already, spread over ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.models import build_cmae
from cmae_scale.models.formats.folders import write_whole
from cmae_scale.models.formats.model_file import ModelFile

pytestmark = pytest.mark.dist


@pytest.fixture
def trained(tiny_run: Callable[..., Any], tmp_path: Path) -> ModelFile:
    """A folder with all parts of another run's model."""
    cfg = tiny_run(cmae={"seed": 5}).cmae
    state = build_cmae(cfg).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand(tensor.shape))
    file = ModelFile(tmp_path / "whole", "ours", state, cfg, cfg.views.mean, cfg.views.std, False, ())
    write_whole(file, file.path)
    return file


@pytest.mark.slow_unless(stage=2)
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, {}), (2, {}), (3, {}), (3, {"bf16": {"enabled": True}})], ids=str
)
def test_every_rank_starts_with_the_files_weights(
    trained: ModelFile,
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    precision: dict[str, Any],
) -> None:
    run = tiny_run(ranks=2, stage=stage, cmae={"model": {"init": str(trained.path)}}, **precision)
    for answer in on_ranks(lambda: train_tiny(run, steps=0), ranks=2):
        for name, tensor in trained.tensors.items():
            expected = tensor
            if precision and name.startswith("target_") and "pos_embed" not in name:
                expected = tensor.bfloat16().float()  # its fp32 master is in the moving average
            torch.testing.assert_close(
                answer["weights"][name].float(), expected.float(), rtol=0, atol=0 if not precision else 5e-3
            )
        assert any(
            notice.startswith(f"started from {trained.path} (this project's names)")
            for notice in answer["notices"]
        )


@pytest.mark.slow_unless(stage=2, precision={"bf16": {"enabled": True}})
@pytest.mark.parametrize(
    "precision", [{}, {"bf16": {"enabled": True}}], ids=["full precision", "bf16 with fp32 crops"]
)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_target_that_the_file_has_moves_on_from_there(
    trained: ModelFile,
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    precision: dict[str, Any],
) -> None:
    """At momentum 0.9, from the file's target and not from the online weights, which are up to 0.1 away."""
    run = tiny_run(ranks=2, stage=stage, cmae={"model": {"init": str(trained.path)}}, **precision)
    weights = on_ranks(lambda: train_tiny(run, steps=1), ranks=2)[0]["weights"]
    name = "target_encoder.blocks.0.attn.qkv.weight"
    online = weights[name.replace("target", "online")].float()
    expected = 0.9 * trained.tensors[name] + 0.1 * online
    torch.testing.assert_close(weights[name].float(), expected, rtol=0, atol=1e-6 if not precision else 5e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_resumed_run_keeps_its_own_weights_and_no_longer_needs_the_file(
    trained: ModelFile,
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
) -> None:
    run = tiny_run(stage=stage, cmae={"model": {"init": str(trained.path)}})
    (straight,) = on_ranks(lambda: train_tiny(run, steps=3, save_at=2), ranks=1)
    shutil.rmtree(trained.path)
    (resumed,) = on_ranks(lambda: train_tiny(run, steps=3), ranks=1)
    assert resumed["first_step"] == 2
    for name, tensor in straight["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name
