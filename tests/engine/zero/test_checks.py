"""Offload, partitioned construction, ZeRO++, 16-bit engines: other places for the same numbers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.zero.checks import check_memory_plan
from cmae_scale.models import CMAE

CPU = {"device": "cpu"}
FUSED = {
    "type": "AdamW",
    "params": {"lr": 1e-3, "eps": 1e-3, "weight_decay": 0.05, "torch_adam": True, "fused": True},
}
# as in test_equality.py
LOSS = {"rtol": 2e-6, "atol": 2e-6}
WEIGHT = {"rtol": 0.0, "atol": 5e-6}
STEPS = 4
_plain: dict[str, dict[str, Any]] = {}


@pytest.fixture
def plain(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> dict[str, Any]:
    """A run with nothing special about it."""
    if not _plain:
        _plain["run"] = on_ranks(lambda: train_tiny(tiny_run(), steps=STEPS), ranks=1)[0]
    return _plain["run"]


@pytest.mark.slow_unless(zero={"stage": 2, "offload_optimizer": CPU})
@pytest.mark.dist
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload_optimizer": CPU},
        {"stage": 2, "offload_optimizer": CPU},
        {"stage": 3, "offload_optimizer": CPU},
        {"stage": 3, "offload_param": CPU},
        {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "stage3_param_persistence_threshold": 0},
        {"stage": 3, "zero_hpz_partition_size": 2},
    ],
    ids=["1 optimizer", "2 optimizer", "3 optimizer", "3 parameters", "3 both", "3 copies per node"],
)
def test_elsewhere_the_numbers_are_the_same(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    plain: dict[str, Any],
    zero: dict[str, Any],
) -> None:
    run = tiny_run(ranks=2, zero_optimization=zero, optimizer=FUSED)
    answers = on_ranks(lambda: train_tiny(run, steps=STEPS), ranks=2)
    for step, expected in plain["losses"].items():
        got = torch.stack([answer["losses"][step] for answer in answers]).mean(0)
        torch.testing.assert_close(got, expected, **LOSS)
    for name, value in answers[0]["weights"].items():  # the target's too
        if "running_" not in name:
            torch.testing.assert_close(value, plain["weights"][name], **WEIGHT, check_dtype=False)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_on_nvme_the_numbers_are_the_same(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    plain: dict[str, Any],
    tmp_path: Path,
    name: str,
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if "CMAE_TEST_NVME" not in os.environ:
        pytest.skip("compiles for minutes: set CMAE_TEST_NVME=1")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    AsyncIOBuilder().load(verbose=False)
    zero = {"stage": 3, name: {"device": "nvme", "nvme_path": str(tmp_path)}, "sub_group_size": 5000}
    run = tiny_run(ranks=2, zero_optimization=zero)
    answers = on_ranks(lambda: train_tiny(run, steps=STEPS), ranks=2)
    for step, expected in plain["losses"].items():
        got = torch.stack([answer["losses"][step] for answer in answers]).mean(0)
        torch.testing.assert_close(got, expected, **LOSS)


@pytest.mark.slow_unless(stage=2)
@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bf16_engine_with_its_masters_on_the_cpu_averages_them(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
) -> None:
    def train(**zero: Any) -> Any:
        run = tiny_run(ranks=2, zero_optimization={"stage": stage, **zero}, bf16={"enabled": True})
        return on_ranks(lambda: train_tiny(run, steps=STEPS), ranks=2)[0]["weights"]

    here, there = train(), train(offload_optimizer=CPU)
    for name in here:
        if name.startswith("target_") and not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(there[name], here[name], rtol=0, atol=2e-3)


@pytest.mark.slow_unless(precision="bf16")
@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_built_in_shards_has_the_weights_of_one_built_whole(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], precision: str
) -> None:
    odd = {"heads": {"hidden_dim": 33, "out_dim": 7}}
    settings = {"bf16": {"enabled": True}} if precision == "bf16" else {}

    def build() -> Any:
        import deepspeed

        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.zero.start import build_model
        from cmae_scale.models import build_cmae

        context = start_processes()
        run = tiny_run(ranks=2, stage=3, cmae=odd, **settings)
        model, _ = build_model(run, device=context.device)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        assert all(buffer.device.type == "cpu" for buffer in model.buffers())
        split = dict(model.named_buffers())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            split |= {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        return split, build_cmae(run.cmae).state_dict()

    for split, whole in on_ranks(build, ranks=2):
        assert set(split) == set(whole)
        for name, value in whole.items():
            is_cast = precision == "bf16" and value.is_floating_point()
            is_cast = is_cast and not name.endswith(("pos_embed", "running_mean", "running_var"))
            expected = value.bfloat16() if is_cast else value
            assert torch.equal(split[name], expected), name


def test_while_a_model_is_built_only_one_module_is_whole(tiny_run: Callable[..., Any]) -> None:
    with torch.device("meta"):
        cfg = tiny_run().cmae
        model = CMAE(cfg, mask=cfg.mask)
    settled = []

    def put_away(module: nn.Module) -> None:
        whole = [
            other
            for other in model.modules()
            if any(p.numel() and not p.is_meta for p in other.parameters(recurse=False))
        ]
        assert whole == [module] * len(whole)
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)
        settled.append(module)

    model.init_(put_away)
    assert settled == list(model.modules())[1:]  # each once; the first is the model itself
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    ("settings", "device", "told"),
    [
        ({"fp16": {"enabled": True}}, "cuda", "write zero_optimization.stage=1"),
        ({"zero_optimization": {"stage": 2, "offload_param": CPU}}, "cuda", "zero_optimization.stage=3"),
        ({"zero_optimization": {"offload_optimizer": CPU}}, "cuda", "does nothing at ZeRO stage 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "x"}}},
            "cuda",
            "does nothing at ZeRO stage 2: write zero_optimization.stage=3",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "cuda",
            "zero_optimization.offload_param.nvme_path is missing",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "cpu", "needs a GPU"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "cpu", "needs a GPU"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "cuda", "does nothing at ZeRO"),
        ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}}, "cuda", "does nothing at ZeRO"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            "cuda",
            "keeps the target in 8 bits",
        ),
    ],
)
def test_a_plan_that_cannot_work_is_told(settings: dict[str, Any], device: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_memory_plan(settings, device=device, has_target=True)
    assert told in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
        {"zero_optimization": {"stage": 1, "offload_optimizer": CPU}, "optimizer": FUSED},
        {"zero_optimization": {"stage": 3, "offload_param": CPU}, "fp16": {"enabled": True}},
    ],
)
def test_a_plan_that_works_passes(settings: dict[str, Any]) -> None:
    check_memory_plan(settings, device="cuda", has_target=True)


def test_without_a_compiler_deepspeeds_own_adam_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    def fail(self: Any, verbose: bool = True) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CPUAdamBuilder, "load", fail)
    settings = {
        "zero_optimization": {"stage": 2, "offload_optimizer": CPU},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    with pytest.raises(ConfigError, match=r"write optimizer\.params\.torch_adam=true"):
        check_memory_plan(settings, device="cuda", has_target=True)


def test_without_libaio_offload_to_nvme_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    nvme = {"device": "nvme", "nvme_path": "x"}
    with pytest.raises(ConfigError, match="install libaio"):
        check_memory_plan(
            {"zero_optimization": {"stage": 3, "offload_param": nvme}}, device="cuda", has_target=True
        )
