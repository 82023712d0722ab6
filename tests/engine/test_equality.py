"""The same run, however it is spread over ranks, ZeRO stages, micro-batches and memory plans.

Where it is not: the heads' BatchNorm, in the projector, the predictor and the target's projector. Its
statistics are those of one micro-batch of all ranks together. Without accumulation that is the whole batch on
any number of ranks, and the runs agree. With accumulation it is a part of the batch, and another part where
the ranks are others, so that only runs with equal ranks and accumulation agree. With cmae.heads.norm "layer"
all do.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.dist

STEPS = 4
# Sums over a batch are split differently, so fp32 rounds differently: some 1e-7 of a loss. Weights move by
# at most lr = 1e-3 a step, so 5e-6 is a 200th of a step.
LOSS = {"rtol": 2e-6, "atol": 2e-6}
WEIGHT = {"rtol": 0.0, "atol": 5e-6}

LAYER = {"heads": {"norm": "layer", "hidden_dim": 32, "out_dim": 8}}
SPREADS = [(1, 4), (2, 2), (4, 1)]  # ranks and accumulation of a batch of 8: always micro-batches of 2
_answers: dict[str, list[dict[str, Any]]] = {}  # of runs that several tests compare with


def mean_losses(answers: list[dict[str, Any]]) -> dict[int, torch.Tensor]:
    return {
        step: torch.stack([answer["losses"][step] for answer in answers]).mean(0)
        for step in answers[0]["losses"]
    }


@pytest.fixture
def train(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> Callable[..., list[dict[str, Any]]]:
    """What each rank of a short run returns; a run that was made before is not made again."""

    def run(*, ranks: int = 1, **how: Any) -> list[dict[str, Any]]:
        name = json.dumps({"ranks": ranks, **how}, sort_keys=True)
        if name not in _answers:
            _answers[name] = on_ranks(
                lambda: train_tiny(tiny_run(ranks=ranks, **how), steps=STEPS), ranks=ranks
            )
        return _answers[name]

    return run


@pytest.fixture
def same_as_plain(train: Callable[..., list[dict[str, Any]]]) -> Callable[..., None]:
    """Compare a way of running with one rank at stage 0, in one micro-batch or as many as `plain` says."""

    def compare(
        *,
        cmae: dict[str, Any] | None = None,
        plain: dict[str, Any] | None = None,
        loss: dict[str, float] = LOSS,
        **how: Any,
    ) -> None:
        reference = train(**({"cmae": cmae} if plain is None else plain))
        answers = train(cmae=cmae, **how)
        torch.testing.assert_close(mean_losses(answers), mean_losses(reference), **loss)
        for answer in answers:
            weights = {name: value for name, value in answer["weights"].items() if "running_" not in name}
            expected = {name: reference[0]["weights"][name] for name in weights}
            torch.testing.assert_close(weights, expected, **WEIGHT, check_dtype=False)

    return compare


@pytest.mark.slow_unless(ranks=2, stage=2)
@pytest.mark.slow_unless(ranks=4, stage=3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "accumulation"), SPREADS)
def test_with_layer_norm_every_spread_at_every_stage_is_the_same_run(
    same_as_plain: Callable[..., None], ranks: int, accumulation: int, stage: int
) -> None:
    same_as_plain(ranks=ranks, stage=stage, accumulation=accumulation, cmae=LAYER)


@pytest.mark.slow_unless(ranks=2, stage=1)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_with_batch_norm_ranks_and_stages_change_nothing(
    same_as_plain: Callable[..., None], ranks: int, stage: int
) -> None:
    same_as_plain(ranks=ranks, stage=stage)


@pytest.mark.slow_unless(ranks=2, stage=3)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_with_batch_norm_and_accumulation_stages_change_nothing(
    same_as_plain: Callable[..., None], ranks: int, stage: int
) -> None:
    same_as_plain(
        ranks=ranks, stage=stage, accumulation=2, plain={"ranks": ranks, "stage": 0, "accumulation": 2}
    )


def test_of_batch_norm_under_accumulation_only_the_contrast_loss_notices_at_first(
    train: Callable[..., list[dict[str, Any]]],
) -> None:
    one, two = (mean_losses(train(accumulation=accumulation))[0] for accumulation in (1, 2))
    torch.testing.assert_close(two[1], one[1], **LOSS)
    assert abs(float(two[2] - one[2])) > 1e-3


@pytest.mark.slow_unless(remat="full", ranks=2, stage=3)
@pytest.mark.slow_unless(remat="selective", stage=1)
@pytest.mark.parametrize("remat", ["selective", "full"])
@pytest.mark.parametrize(("ranks", "stage", "accumulation"), [(1, 0, 1), (1, 3, 4), (2, 1, 2), (2, 3, 1)])
def test_rematerialisation_changes_nothing(
    same_as_plain: Callable[..., None], remat: str, ranks: int, stage: int, accumulation: int
) -> None:
    same_as_plain(
        ranks=ranks,
        stage=stage,
        accumulation=accumulation,
        cmae={**LAYER, "model": {"remat": remat}},
        plain={"cmae": LAYER},
    )


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeeds_own_checkpointing_changes_nothing(same_as_plain: Callable[..., None], stage: int) -> None:
    same_as_plain(
        ranks=2, stage=stage, activation_checkpointing={"partition_activations": False}, plain={"cmae": None}
    )


@pytest.mark.slow_unless(cmae={"loss": {"weight": 0.0}})
@pytest.mark.parametrize(
    "cmae",
    [
        {"loss": {"weight": 0.0}},
        {"loss": {"contrast": "byol", "scale": "paper"}},
        {"target": {"final_norm": True, "mask_ratio": 0.5, "pool": "cls"}},
        {"model": {"feature_decoder": {"depth": 0, "embed_dim": 16, "num_heads": 2}}},
        {"model": {"feature_decoder": {"depth": 1, "embed_dim": 16, "num_heads": 2, "shared": True}}},
        {"views": {"color": False, "flip_p": 1.0}},
    ],
    ids=["mae", "byol", "target", "no feature decoder", "shared decoder", "views"],
)
def test_every_variant_of_the_method_is_the_same_under_zero_3(
    same_as_plain: Callable[..., None], cmae: dict[str, Any]
) -> None:
    same_as_plain(ranks=2, stage=3, cmae=cmae)


HYBRID = {"model": {"conv": {"dims": [8, 16], "depths": [1, 2], "mlp_ratio": 2.0}}}
# its blocks are more, and each of a convolution's weights sums over all sites: seen were 2.4e-6 of a loss
HYBRID_LOSS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.slow_unless(ranks=2, stage=3)
@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3)])
def test_the_hybrid_encoder_is_the_same_however_it_is_spread(
    same_as_plain: Callable[..., None], ranks: int, stage: int
) -> None:
    same_as_plain(ranks=ranks, stage=stage, cmae=HYBRID, loss=HYBRID_LOSS)


@pytest.mark.slow_unless(way="full")
@pytest.mark.parametrize("way", ["selective", "full", "deepspeed", "mae"])
def test_the_hybrid_encoder_is_the_same_rematerialised_and_alone(
    same_as_plain: Callable[..., None], way: str
) -> None:
    how: dict[str, Any] = {"stage": 3, "loss": HYBRID_LOSS}
    if way == "deepspeed":
        checkpointing = {"partition_activations": False}
        same_as_plain(ranks=2, cmae=HYBRID, activation_checkpointing=checkpointing, **how)
    elif way == "mae":
        same_as_plain(ranks=2, cmae={**HYBRID, "loss": {"weight": 0.0}}, **how)
    else:
        same_as_plain(cmae={"model": {**HYBRID["model"], "remat": way}}, plain={"cmae": HYBRID}, **how)


@pytest.mark.slow
def test_a_restart_in_the_middle_changes_nothing(
    train: Callable[..., list[dict[str, Any]]],
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
) -> None:
    run = tiny_run(ranks=2, stage=2, accumulation=2, cmae=LAYER)
    begun = on_ranks(lambda: train_tiny(run, steps=2, save_at=2), ranks=2)
    ended = on_ranks(lambda: train_tiny(run, steps=STEPS), ranks=2)
    torch.testing.assert_close(
        {**mean_losses(begun), **mean_losses(ended)}, mean_losses(train(cmae=LAYER)), **LOSS
    )


@pytest.mark.slow_unless(stage=2, precision={"bf16": {"enabled": True}})
@pytest.mark.slow_unless(stage=3, precision={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}})
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "precision", [{"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, {"bf16": {"enabled": True}}]
)
def test_low_precision_follows_full_precision(
    train: Callable[..., list[dict[str, Any]]], stage: int, precision: dict[str, Any]
) -> None:
    # clipped: in full steps of so small a model, rounding errors grow with every step
    clipping = {"gradient_clipping": 1.0}
    low = mean_losses(train(ranks=2, stage=stage, **clipping, **precision))
    full = mean_losses(train(cmae=None, **clipping))
    # bf16 has 8 bits, 0.4 % a product, and the temperature divides a cosine's error by 0.07. How fast errors
    # grow from step to step depends on how a machine sums products
    for step, losses in low.items():
        torch.testing.assert_close(losses, full[step], rtol=0.03 * (1 + step), atol=0.03)
