"""Every shipped run file reads, resolves and builds; what its table says of it is true."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.precision import FormatName, is_left_to_machine, write_autocast
from cmae_scale.config.run_file import read_run, resolve_run
from cmae_scale.config.study import read_study
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.models import build_cmae

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(path for path in FOLDER.rglob("*.json") if path.parent.name != "schema")
CONFIGS = [path for path in FILES if '"cmae": {' in path.read_text() and path.stem != "cifar"]
TRANSFERS = [path for path in FILES if '"transfer": {' in path.read_text()]
STUDIES = [path for path in FILES if path not in CONFIGS and path not in TRANSFERS]
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


@pytest.mark.parametrize("path", [*CONFIGS, *TRANSFERS], ids=lambda path: path.stem)
def test_every_shipped_file_leaves_its_precision_to_the_machine(path: Path) -> None:
    kind = "transfer" if path in TRANSFERS else "cmae"
    assert is_left_to_machine(read_run(path, kind=kind).deepspeed)


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
    micro = "train_micro_batch_size_per_gpu"
    memory = {"zero_optimization", "activation_checkpointing", micro}
    for name in (set(plan.deepspeed) | set(base.deepspeed)) - memory:
        assert plan.deepspeed.get(name) == base.deepspeed.get(name), name
    assert base.deepspeed[micro] == 2 * plan.deepspeed[micro], "half of it, as ds_configs/README.md says"
    assert plan.deepspeed["zero_optimization"] != base.deepspeed["zero_optimization"]


def test_deepspeed_accepts_its_part(config: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = read_run(config)
    batch = plan_batch(run.deepspeed, ranks=1)
    resolved = resolve_run(run, batch=batch, total_steps=10, warmup_steps=1).deepspeed
    for compute in get_args(FormatName):
        DeepSpeedConfig(write_autocast(resolved, compute))


def test_the_table_names_every_run_file() -> None:
    table = (FOLDER / "README.md").read_text()
    for path in FILES:
        assert f"`{path.relative_to(FOLDER)}`" in table, path.name


@pytest.mark.parametrize("path", TRANSFERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("ranks", [1, 8])  # as many as the official batch of 1024 is spread over
def test_a_transfer_file_resolves_and_deepspeed_accepts_its_part(path: Path, ranks: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = read_run(path, kind="transfer")
    assert run.kind == "transfer"
    if run.transfer.task.knn is not None:
        return
    batch = plan_batch(run.deepspeed, ranks=ranks)
    resolved = resolve_run(run, batch=batch, total_steps=1000, warmup_steps=100)
    assert resolved.peak_lr == pytest.approx(run.transfer.schedule.base_lr * batch.total / 256)
    if ranks == 1:
        settled = write_autocast(resolved.deepspeed, "bfloat16")
        DeepSpeedConfig({name: value for name, value in settled.items() if name != "optimizer"})


def test_the_fine_tuning_files_have_the_official_values() -> None:
    def read(name: str) -> TransferConfig:
        return read_run(FOLDER / "transfer" / f"{name}.json", kind="transfer").transfer

    base, large = read("finetune_vitb"), read("finetune_vitl")
    assert base.task.finetune is not None
    assert large.task.finetune is not None
    # Source: official CMAE config; MAE repository's row for ViT-L
    assert (base.schedule.base_lr, base.task.finetune.layer_decay, base.task.finetune.drop_path) == (
        5e-4,
        0.65,
        0.1,
    )
    assert (base.schedule.duration, base.schedule.min_lr_rule) == ("100ep", "absolute")
    assert (large.schedule.base_lr, large.task.finetune.layer_decay, large.task.finetune.drop_path) == (
        1e-3,
        0.75,
        0.2,
    )
    assert (large.schedule.duration, large.schedule.min_lr_rule) == ("50ep", "scaled")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_cells_of_a_study_are_runs_that_can_be_read(path: Path) -> None:
    from cmae_scale.tasks.study import plan_cells

    cells = plan_cells(read_study(path), folder=path.parent, out=Path("runs/study"))
    assert len(cells) == 11
    for cell in cells:
        file, settings = cell.arguments[1], list(cell.arguments[3:-2])
        kind = "cmae" if cell.command == "pretrain" else "transfer"
        read_run(file, settings, kind=kind)
