"""Every shipped run file reads, resolves and builds; what its table says of it is true."""

from pathlib import Path

import pytest
import torch

from cmae_scale.core.batches import plan_batch
from cmae_scale.core.config import read_run, resolve_run
from cmae_scale.models import build_cmae

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "ds_configs").rglob("*.json"))
TRAINABLE = {  # Source: the official CMAE-B and the MAE models, counted; see tests/models/test_parameters.py
    "vits": 55_880_832,
    "vitb": 121_118_208,
    "vitl": 339_357_440,
    "vitl_zero3": 339_357_440,
    "mae_vitb": 111_655_680,
    "convvitb": 124_253_056,
}


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.mark.parametrize("ranks", [1, 8, 32])
def test_it_resolves_on_one_and_on_many_gpus(config: Path, ranks: int) -> None:
    run = read_run(config)
    batch = plan_batch(run.deepspeed, ranks=ranks)
    resolved = resolve_run(run, batch=batch, total_steps=1000, warmup_steps=100)
    assert batch.micro * batch.accumulation * ranks == batch.total
    assert resolved.peak_lr == pytest.approx(run.cmae.schedule.base_lr * batch.total / 256)


def test_its_model_builds(config: Path) -> None:
    with torch.device("meta"):
        model = build_cmae(read_run(config).cmae)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == TRAINABLE.get(config.stem, trainable)


def test_the_convmae_baseline_is_as_large_as_published() -> None:
    """The switch that ds_configs/README.md gives."""
    table = (CONFIGS[0].parent / "README.md").read_text()
    switch = table[table.index("--set cmae.loss.weight=0 cmae.mask") :].split("`")[0]
    run = read_run(CONFIGS[0].parent / "convvitb.json", switch.split()[1:])
    with torch.device("meta"):
        model = build_cmae(run.cmae)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 114_790_528


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "_zero" in path.stem], ids=lambda path: path.stem
)
def test_another_memory_plan_is_the_same_run(path: Path) -> None:
    plan, base = read_run(path), read_run(path.with_name(f"{path.stem.partition('_zero')[0]}.json"))
    assert plan.cmae == base.cmae
    memory = {"zero_optimization", "activation_checkpointing"}
    for name in (set(plan.deepspeed) | set(base.deepspeed)) - memory:
        assert plan.deepspeed.get(name) == base.deepspeed.get(name), name
    assert plan.deepspeed["zero_optimization"] != base.deepspeed["zero_optimization"]


def test_deepspeed_accepts_its_part(config: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = read_run(config)
    batch = plan_batch(run.deepspeed, ranks=1)
    DeepSpeedConfig(resolve_run(run, batch=batch, total_steps=10, warmup_steps=1).deepspeed)


def test_the_table_names_every_run_file() -> None:
    table = (CONFIGS[0].parent / "README.md").read_text()
    for path in CONFIGS:
        assert f"`{path.relative_to(CONFIGS[0].parent)}`" in table, path.name
