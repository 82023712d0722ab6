"""Gradient norms, target distance and feature spread against plain computations; the advice they lead to."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmae_scale.config.run_file import Run
from cmae_scale.engine.metrics.health import CollapseWarnings, measure_spread

ODD = {"heads": {"hidden_dim": 33, "out_dim": 7}}  # so that ZeRO-3 has to pad


def look(run: Run, *, steps: int = 2) -> dict[str, Any]:
    """Health of the last of some steps, and the gradients and weights to compute it from, where whole."""
    from cmae_scale.config.batches import plan_batch
    from cmae_scale.config.schedules import TargetMomentum
    from cmae_scale.data.stream import CropBatch
    from cmae_scale.engine.pretraining import Pretraining
    from cmae_scale.engine.process.group import start_processes
    from cmae_scale.engine.setup import start_pretraining, watch_health
    from cmae_scale.engine.zero.partitions import gather_weights

    context = start_processes()
    batch = plan_batch(run.deepspeed, ranks=context.world.size)
    state = start_pretraining(run, context=context, data_order="none")
    health = watch_health(state)
    task = Pretraining(state, batch, TargetMomentum(run.cmae.target.momentum, total_steps=10), health)
    engine, side = state.engine, run.cmae.views.master_px
    gradients: dict[str, float] = {}

    def update(_: Any) -> bool:
        assert health is not None
        health.look_at_gradients(engine)
        for name, parameter in engine.module.named_parameters():
            if parameter.grad is not None and not hasattr(parameter, "_hp_mapping"):
                gradients[name] = float(parameter.grad.double().square().sum())
        engine.step()
        return True

    for step in range(steps):
        assert health is not None
        health.is_due = step == steps - 1
        pixels = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (8, 1, 3, side, side), generator=pixels, dtype=torch.uint8)
        rows = images[context.world.rank * batch.local :][: batch.local]
        parts = [
            CropBatch(part, torch.zeros(batch.micro, dtype=torch.int64), (), step, i)
            for i, part in enumerate(rows.split(batch.micro))
        ]
        task.take_step(parts, step=step, update=update)
    norm = engine.get_global_grad_norm()
    return {
        "health": health.read(contrast=1.0),
        "gradients": gradients,
        "weights": gather_weights(engine.module),
        "norm": None if norm is None else float(norm),
    }


PARTS = {
    "encoder": ("online_encoder.",),
    "pixel_decoder": ("pixel_decoder.",),
    "feature_decoder": ("feature_decoder.",),
    "heads": ("projector.", "predictor."),
}


def norms_by_part(gradients: dict[str, float]) -> dict[str, float]:
    return {
        f"grad_norm_{part}": math.sqrt(sum(v for name, v in gradients.items() if name.startswith(prefixes)))
        for part, prefixes in PARTS.items()
    }


def distance(weights: dict[str, torch.Tensor]) -> float:
    apart = whole = 0.0
    for name, target in weights.items():
        if name.startswith("target_") and not name.endswith(("pos_embed", "running_mean", "running_var")):
            if name.endswith("num_batches_tracked"):
                continue
            online = weights[name.replace("target_encoder", "online_encoder").replace("target_proj", "proj")]
            apart += float((online.double() - target.double()).square().sum())
            whole += float(online.double().square().sum())
    return math.sqrt(apart / whole)


@pytest.fixture
def plain(on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any]) -> dict[str, Any]:
    answer: dict[str, Any] = on_ranks(lambda: look(tiny_run(cmae=ODD)), ranks=1)[0]
    return answer


@pytest.mark.dist
def test_on_one_rank_all_figures_equal_plain_sums(plain: dict[str, Any]) -> None:
    health = plain["health"]
    expected = norms_by_part(plain["gradients"])
    assert {name: health[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in expected.values())
    assert health["grad_norm"] == pytest.approx(math.sqrt(sum(plain["gradients"].values())), rel=1e-5)
    assert health["target_distance"] == pytest.approx(distance(plain["weights"]), rel=1e-4)
    assert 0 < health["target_distance"] < 0.1
    assert health["contrast_vs_chance"] == pytest.approx(1 / math.log(8))


@pytest.mark.slow_unless(stage=2)
@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (0, {}),
        (1, {}),
        (2, {}),
        (3, {}),
        (2, {"accumulation": 2, "cmae": {"heads": {"norm": "layer", "hidden_dim": 33, "out_dim": 7}}}),
        (1, {"gradient_clipping": 0.01}),
        (3, {"gradient_clipping": 0.01}),
    ],
    ids=["0", "1", "2", "3", "accumulation", "clipping 1", "clipping 3"],
)
def test_split_over_ranks_they_are_the_same(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    stage: int,
    how: dict[str, Any],
) -> None:
    settings = {"cmae": ODD, **how}
    whole_settings = {name: value for name, value in settings.items() if name != "accumulation"}
    whole = on_ranks(lambda: look(tiny_run(**whole_settings)), ranks=1)[0]
    for answer in on_ranks(lambda: look(tiny_run(ranks=2, stage=stage, **settings)), ranks=2):
        assert answer["health"] == pytest.approx(whole["health"], rel=2e-4)
        if answer["norm"] is not None and not how.get("gradient_clipping"):
            assert answer["health"]["grad_norm"] == pytest.approx(answer["norm"], rel=1e-4)


@pytest.mark.slow_unless(stage=3)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bf16_engine_is_measured_too(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], plain: dict[str, Any], stage: int
) -> None:
    run = tiny_run(ranks=2, stage=stage, cmae=ODD, bf16={"enabled": True})
    for answer in on_ranks(lambda: look(run), ranks=2):
        assert answer["health"] == pytest.approx(plain["health"], rel=0.15)  # bf16, after a few steps
        assert answer["health"]["grad_norm"] == pytest.approx(answer["norm"], rel=1e-2)


@pytest.mark.dist
def test_a_plain_mae_has_no_target_and_no_features(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any]
) -> None:
    health = on_ranks(lambda: look(tiny_run(cmae={"loss": {"weight": 0.0}})), ranks=1)[0]["health"]
    assert set(health) == {"grad_norm", "grad_norm_encoder", "grad_norm_pixel_decoder"}


def test_spread_is_one_all_around_and_zero_for_one_direction(rng: torch.Generator) -> None:
    assert float(measure_spread(torch.randn(4000, 64, generator=rng))) == pytest.approx(1, abs=0.01)
    assert float(measure_spread(torch.ones(50, 8) * torch.rand(50, 1, generator=rng))) < 1e-6
    vectors = torch.randn(20, 5, generator=rng, dtype=torch.float64)
    rows = [row / row.norm() for row in vectors]
    columns = [[float(row[dim]) for row in rows] for dim in range(5)]
    deviations = [math.sqrt(sum((x - sum(c) / 20) ** 2 for x in c) / 20) for c in columns]
    assert float(measure_spread(vectors)) == pytest.approx(sum(deviations) / 5 * math.sqrt(5), rel=1e-5)


def hear(lines: list[dict[str, float]], *, warmup: int = 0) -> list[str]:
    warnings = CollapseWarnings(warmup_steps=warmup)
    healthy = {"contrast": 1.0, "contrast_vs_chance": 0.2, "query_spread": 0.9, "key_spread": 0.9}
    return [
        text
        for number, line in enumerate(lines, start=1)
        for text in warnings.check({**healthy, **line, "step": number})
    ]


def test_a_healthy_run_gets_no_advice() -> None:
    assert hear([{"contrast": 2.0 / step} for step in range(1, 50)]) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"contrast_vs_chance": 0.995}, "99.5% of blind guessing"),
        ({"query_spread": 0.02}, "queries of different images are nearly the same (query_spread 0.020"),
        ({"key_spread": 0.02}, "keys of different images are nearly the same"),
    ],
)
def test_a_collapse_is_told_once_and_only_after_warm_up(line: dict[str, float], told: str) -> None:
    [advice] = hear([line] * 20)
    assert told in advice
    assert advice.startswith("advice: ")
    assert hear([line] * 20, warmup=20) == []
    assert hear([line] * 4) == []


def test_a_rising_contrast_is_told_again_after_it_had_fallen() -> None:
    wave = [1.0] * 6 + [1.5] * 8 + [1.0] * 8 + [1.5] * 8
    told = hear([{"contrast": value} for value in wave])
    assert len(told) == 2
    assert "the contrast loss rises" in told[0]
