"""The linear probe beside scikit-learn and beside MAE's optimizer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmae_scale.engine.zero.start import build_lars


def step_lars_(weights: list[torch.Tensor], state: list[torch.Tensor], *, lr: float) -> None:
    """MAE's LARS as its paper and code say it: trust ratio on matrices, then momentum."""
    for weight, velocity in zip(weights, state, strict=True):
        assert weight.grad is not None
        update = weight.grad
        if weight.ndim > 1:
            update = update * (0.001 * weight.data.norm() / update.norm())
        velocity.mul_(0.9).add_(update)
        weight.data.sub_(lr * velocity)


def test_lars_is_maes(rng: torch.Generator) -> None:
    ours, theirs = (
        [torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(5)] for _ in range(2)
    )
    for weight in (*ours, *theirs):
        weight.requires_grad_(True)
    groups = [{"params": [weight], "always_adapt": weight.ndim > 1} for weight in ours]
    optimizer = build_lars(groups, settings={"optimizer": {"params": {"lr": 0.5, "momentum": 0.9}}})
    state = [torch.zeros_like(weight) for weight in theirs]
    inputs, labels = torch.randn(64, 8, generator=rng), torch.randint(5, (64,), generator=rng)
    for _ in range(5):
        for weight, bias in (ours, theirs):
            weight.grad = bias.grad = None
            torch.nn.functional.cross_entropy(inputs @ weight.T + bias, labels).backward()
        optimizer.step()
        step_lars_(theirs, state, lr=0.5)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.dist
def test_its_accuracy_is_logistic_regressions_on_the_same_features(
    arguments: Callable[..., list[str]],
    transfer: Callable[..., list[int]],
    shards: Path,
    encoder_folder: Path,
    tmp_path: Path,
) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from cmae_scale.config.transfer import TransferConfig
    from cmae_scale.core.world import World
    from cmae_scale.tasks.build import open_context
    from cmae_scale.tasks.encode import encode_with

    task = {"linear": {"pool": "mean", "features": "once", "sweep": [1.0, 100.0, 1000.0]}}
    long = ["transfer.schedule.duration=150st", "transfer.monitor.evaluate_every=150st"]
    assert transfer(arguments(task, *long, optimizer="LARS")) == [0]
    cfg = TransferConfig.model_validate_json(
        json.dumps(json.loads((tmp_path / "run" / "config.json").read_text())["transfer"])
    )
    context = open_context(cfg, world=World(), device=torch.device("cpu"))
    encode = encode_with(context.encoder, context.preprocessor, img_px=16, pool="mean")
    train, val = (
        context.evaluator.extract(encode, part)
        for part in (context.evaluator.labelled.train, context.evaluator.labelled.val)
    )
    oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    oracle.fit(train.values.numpy(), train.labels.numpy())
    expected = oracle.score(val.values.numpy(), val.labels.numpy())
    found = json.loads((tmp_path / "run" / "results.json").read_text())["last"]
    assert expected > 0.5
    assert found["val_top1"] == pytest.approx(expected, abs=3 / 21)
