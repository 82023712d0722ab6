"""Smaller parts of the engine: parameter groups, the meter, inputs, precision, exported weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.config.cmae import CmaeConfig, LossConfig
from cmae_scale.config.run_file import read_run
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.inputs import draw_step
from cmae_scale.engine.metrics.logger import MetricAverage, drop_later_lines, set_aside
from cmae_scale.engine.precision import read_precision
from cmae_scale.engine.pretraining import METRIC_NAMES, contrast_factor
from cmae_scale.engine.zero.remat import choose_block_runner
from cmae_scale.engine.zero.start import weight_decay_groups
from cmae_scale.models import build_cmae


def test_weight_decay_splits_the_official_model_as_the_official_code(repository: Path) -> None:
    with torch.device("meta"):
        model = build_cmae(read_run(repository / "ds_configs" / "vitb.json").cmae)
    with_decay, without = weight_decay_groups(model, weight_decay=0.05)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.05, 0.0)
    assert sum(p.numel() for p in with_decay["params"]) == 120_916_992
    assert sum(p.numel() for p in without["params"]) == 201_216


def test_weight_decay_splits_the_baseline_as_mae(repository: Path) -> None:
    """Source: timm's add_weight_decay, which MAE's main_pretrain.py calls."""
    with torch.device("meta"):
        cfg = read_run(repository / "ds_configs" / "mae_vitb.json").cmae
        model = build_cmae(cfg)
    with_decay, without = weight_decay_groups(model, weight_decay=0.05, decay_tokens=cfg.decay_tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in with_decay["params"]} == {id(p) for p in trained if p.ndim > 1}
    assert {id(p) for p in without["params"]} == {id(p) for p in trained if p.ndim <= 1}


def test_no_frozen_parameter_reaches_the_optimizer(tiny_run: Callable[..., Any]) -> None:
    model = build_cmae(tiny_run().cmae)
    grouped = {id(p) for group in weight_decay_groups(model, weight_decay=0.1) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert not grouped & {id(pair.target) for pair in model.target_pairs()}


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_rank_that_keeps_no_weights_helps_the_others_to_gather_them(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], stage: int, bf16: bool
) -> None:
    def gather() -> Any:
        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.setup import start_pretraining
        from cmae_scale.engine.zero.partitions import gather_weights

        context = start_processes()
        run = tiny_run(ranks=2, stage=stage, bf16={"enabled": bf16})
        state = start_pretraining(run, context=context, data_order="none")
        everywhere = gather_weights(state.engine.module)
        return everywhere, gather_weights(state.engine.module, is_kept=context.world.is_first)

    (everywhere, first), (same, second) = on_ranks(gather, ranks=2)
    assert list(everywhere) == list(first) == list(same)
    assert all(torch.equal(everywhere[name], value) for name, value in first.items())
    assert second == {}


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        ({}, 0.14),
        ({"scale": "paper"}, 1.0),
        ({"weight": 0.5, "temperature": 0.1}, 0.1),
        ({"contrast": "byol"}, 1.0),
    ],
)
def test_the_contrast_loss_is_scaled_as_the_official_head_does(loss: dict[str, Any], factor: float) -> None:
    assert contrast_factor(LossConfig.model_validate(loss)) == pytest.approx(factor)


def losses(value: float) -> torch.Tensor:
    return torch.tensor([value, 1.0, 2.0])


def test_the_meter_gives_means_since_the_last_reading() -> None:
    meter = MetricAverage(METRIC_NAMES)
    for value in (1.0, 2.0, 6.0):
        meter.add(losses(value))
    assert meter.read() == {"loss": 3, "pixel": 1, "contrast": 2}
    meter.add(losses(5.0))
    assert meter.read()["loss"] == 5
    assert meter.read() == {"loss": None, "pixel": None, "contrast": None}


def test_views_and_masks_of_a_row_do_not_depend_on_how_the_batch_is_cut(tiny_run: Callable[..., Any]) -> None:
    cfg: CmaeConfig = tiny_run().cmae
    images = torch.randint(0, 256, (8, 1, 3, 20, 20), dtype=torch.uint8)
    draws = draw_step(cfg, total=8, step=3)
    whole = draws.prepare(images, first_row=0, cfg=cfg)
    part = draws.prepare(images[5:7], first_row=5, cfg=cfg)
    for name in ("online", "target", "noise", "target_noise"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[5:7]), name


def test_two_steps_draw_other_numbers(tiny_run: Callable[..., Any]) -> None:
    first, second = (draw_step(tiny_run().cmae, total=8, step=step) for step in (0, 1))
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.noise, first.target_noise)


@pytest.mark.parametrize(
    ("settings", "compute", "parameters"),
    [
        ({}, torch.float32, torch.float32),
        ({"torch_autocast": {"enabled": True}}, torch.bfloat16, torch.float32),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, torch.float16, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16, torch.bfloat16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, torch.float16, torch.float16),
    ],
)
def test_precision_is_read_as_deepspeed_reads_it(
    settings: dict[str, Any], compute: torch.dtype, parameters: torch.dtype
) -> None:
    precision = read_precision(settings)
    assert (precision.compute, precision.parameters) == (compute, parameters)


def test_an_unknown_autocast_type_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch_autocast.dtype: \"int8\""):
        read_precision({"torch_autocast": {"enabled": True, "dtype": "int8"}})


def test_two_kinds_of_checkpointing_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        choose_block_runner("selective", settings={"activation_checkpointing": {}})


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) for step in (10, 20, 30)]
    path.write_text("\n".join([*lines, '{"step": 4']))
    assert drop_later_lines(path, step=20) == 0
    assert path.read_text().splitlines() == lines[:2]


def test_damaged_lines_of_metrics_are_counted_and_cost_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n{"st\xffep": 20}\n[17]\n{"step": "30"}\n{"step": 40}\n')
    assert drop_later_lines(path, step=40) == 3
    assert path.read_bytes() == b'{"step": 10}\n{"step": 40}\n'


def test_metrics_of_a_run_without_a_state_are_set_aside_and_never_over_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert set_aside(path) is None
    for number in (1, 2):
        path.write_text(f"{number}\n")
        assert set_aside(path) == tmp_path / f"metrics_{number}.jsonl"
    assert [each.read_text() for each in sorted(tmp_path.iterdir())] == ["1\n", "2\n"]


def test_a_run_folder_that_cannot_be_written_is_told(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="cannot write into the run folder"):
        on_ranks(lambda: train_tiny(tiny_run(cmae={"out": str(tmp_path / "file" / "run")}), steps=1), ranks=1)
