import json
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.deepspeed_keys import NESTED, TOP_LEVEL
from cmae_scale.config.precision import write_autocast
from cmae_scale.config.run_file import RunKind, dump_run, read_run, resolve_run
from cmae_scale.core.errors import ConfigError

SMALLEST: dict[str, Any] = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "cmae": {"model": {"encoder": "vit_base"}, "data": {"shards": "shards/x"}},
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SMALLEST))
    return path


def test_defaults_follow_the_official_code(run_file: Path) -> None:
    cmae = read_run(run_file).cmae
    assert (cmae.mask.ratio, cmae.mask.cell) == (0.65, 2)
    assert (cmae.loss.scale, cmae.loss.temperature) == ("official", 0.07)
    assert not cmae.target.final_norm
    assert (cmae.target.pool, cmae.target.momentum) == ("mean", 0.996)
    assert (cmae.views.master_px, cmae.views.img_px, cmae.views.shift_px) == (256, 224, 32)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("cmae.mask.ratoi=0.5", "\"cmae.mask.ratoi\" is not a setting; did you mean 'ratio'?"),
        ("cmae.ratio=0.5", "did you mean 'cmae.mask.ratio'?"),
        ("cmae.mask.ratio=1.5", "cmae.mask.ratio: input should be less than 1, not 1.5"),
        ("cmae.mask.ratio=half", "cmae.mask.ratio: input should be a valid number, not 'half'"),
        ("cmae.model.encoder=vit_bass", "cmae.model.encoder"),
        ("cmae.model.patch_size=15", "views.img_px 224 is not a multiple of model.patch_size 15"),
        ("cmae.mask.cell=3", "mask.cell 3 does not divide the 14 x 14 patch grid"),
        ("cmae.views.shift_px=40", "shift_px 40 leaves the master image: write at most 33"),
        ("cmae.schedule.duration=300", "cmae.schedule.duration: 300 is no duration"),
        ("cmae.schedule.duration=3weeks", "write \"300ep\""),
        ("cmae.model.depth=3", "encoder names a size already"),
        ("zero_optimisation.stage=2", "\"zero_optimisation\" is not a DeepSpeed setting; did you mean"),
        ("zero_optimization.stag=2", "did you mean 'stage'?"),
        ("zero_optimization.stage=auto", "what \"auto\" should be for zero_optimization.stage"),
        ("zero_optimization.stage=4", "zero_optimization.stage must be 0, 1, 2 or 3"),
        ("zero_optimization.offload_param.devise=cpu", "did you mean 'device'?"),
        ("optimizer.params.betass=1", "did you mean 'betas'?"),
        ("optimizer=AdamW", "optimizer must be an object"),
        ("mask.ratio=0.5", "\"mask\" is not a DeepSpeed setting; \"cmae.mask\" is one of ours"),
        ("cmae.mask.ratio", "write KEY=VALUE"),
        ("train_batch_size.x=1", "is not an object"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_names_the_place(run_file: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_run(run_file, [override])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("section", sorted(name for name, inside in TOP_LEVEL.items() if inside))
def test_a_letter_left_out_of_a_deepspeed_name_is_found(run_file: Path, section: str) -> None:
    for name in TOP_LEVEL[section] or ():
        typo = name[:1] + name[2:]
        if typo in (TOP_LEVEL[section] or ()):
            continue
        with pytest.raises(ConfigError, match=f"{section}.{typo}"):
            read_run(run_file, [f"{section}.{typo}=1"])


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"train_batch_size": 1, "train_batch_size": 2}')
    with pytest.raises(ConfigError, match='"train_batch_size" stands twice'):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "told"), [("{", "line 1: not JSON"), ("[]", "one JSON object"), ("{}", '"cmae" is missing')]
)
def test_a_file_that_is_no_run_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_run(path)


def test_a_missing_file_names_the_nearest_one(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'run.json'\?"):
        read_run(run_file.with_name("rum.json"))


def test_overrides_take_json_values_and_plain_words(run_file: Path) -> None:
    run = read_run(
        run_file,
        ["cmae.mask.ratio=0.75", "cmae.out=runs/a b", "zero_optimization.stage=3", "fp16.enabled=true"],
    )
    assert run.cmae.mask.ratio == 0.75
    assert run.out == Path("runs/a b")
    assert run.deepspeed["zero_optimization"]["stage"] == 3
    assert run.deepspeed["fp16"]["enabled"] is True


def test_the_run_folder_is_named_after_the_run_file(run_file: Path) -> None:
    assert read_run(run_file).out == Path("runs/run")


def test_the_resolved_file_reads_back_as_the_same_run(run_file: Path, tmp_path: Path) -> None:
    overrides = ["zero_optimization.reduce_bucket_size=auto"]
    run = read_run(run_file, overrides)
    batch = plan_batch(run.deepspeed, ranks=2)
    resolved = resolve_run(run, batch=batch, total_steps=100, warmup_steps=10)
    assert resolved.peak_lr == pytest.approx(1.5e-4)
    assert resolved.deepspeed["gradient_accumulation_steps"] == 2
    assert "reduce_bucket_size" not in resolved.deepspeed["zero_optimization"]
    again = tmp_path / "config.json"
    again.write_text(dump_run(resolved))
    read_back = read_run(again)
    assert read_back.cmae == resolved.cmae
    assert read_back.deepspeed == resolved.deepspeed


@pytest.mark.parametrize(("overrides", "clipping"), [([], 0.0), (["gradient_clipping=3.0"], 3.0)])
def test_gradients_are_clipped_only_where_the_run_file_says_so(
    run_file: Path, overrides: list[str], clipping: float
) -> None:
    """DeepSpeed's own default is to clip at a norm of 1."""
    from deepspeed.runtime.config import DeepSpeedConfig

    run = read_run(run_file, overrides)
    batch = plan_batch(run.deepspeed, ranks=1)
    resolved = resolve_run(run, batch=batch, total_steps=10, warmup_steps=1)
    settled = write_autocast(resolved.deepspeed, "float32")
    assert DeepSpeedConfig(settled).gradient_clipping == clipping


def test_scheduler_totals_follow_the_schedule(run_file: Path) -> None:
    run = read_run(
        run_file,
        [
            "scheduler.type=WarmupCosineLR",
            "scheduler.params.total_num_steps=auto",
            "scheduler.params.warmup_num_steps=auto",
        ],
    )
    resolved = resolve_run(run, batch=plan_batch(run.deepspeed, ranks=1), total_steps=100, warmup_steps=10)
    assert resolved.deepspeed["scheduler"]["params"] == {"total_num_steps": 100, "warmup_num_steps": 10}


def test_the_known_names_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(model: Any) -> set[str]:
        fields = model.model_fields
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    for section, model in {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "tensorboard": TensorBoardConfig,
        "wandb": WandbConfig,
        "csv_monitor": CSVConfig,
    }.items():
        assert names(model) <= (TOP_LEVEL[section] or set()), section
    assert names(DeepSpeedZeroOffloadParamConfig) <= NESTED["zero_optimization", "offload_param"]
    assert names(DeepSpeedZeroOffloadOptimizerConfig) <= NESTED["zero_optimization", "offload_optimizer"]


def test_every_constant_deepspeed_reads_at_the_top_is_known() -> None:
    from deepspeed.runtime import constants

    known_inside = {name for inside in TOP_LEVEL.values() if inside for name in inside}
    for constant in [
        "TRAIN_BATCH_SIZE",
        "TRAIN_MICRO_BATCH_SIZE_PER_GPU",
        "GRADIENT_ACCUMULATION_STEPS",
        "OPTIMIZER",
        "SCHEDULER",
        "FP16",
        "BFLOAT16",
        "TORCH_AUTOCAST",
        "GRADIENT_CLIPPING",
        "STEPS_PER_PRINT",
        "WALL_CLOCK_BREAKDOWN",
        "DUMP_STATE",
        "DATA_TYPES",
        "PRESCALE_GRADIENTS",
        "GRADIENT_PREDIVIDE_FACTOR",
        "COMMUNICATION_DATA_TYPE",
        "DATALOADER_DROP_LAST",
        "CHECKPOINT",
        "ZERO_ALLOW_UNTESTED_OPTIMIZER",
        "ZERO_FORCE_DS_CPU_OPTIMIZER",
        "MEMORY_BREAKDOWN",
        "LOG_LEVEL",
        "DISABLE_ALLGATHER",
    ]:
        assert getattr(constants, constant) in TOP_LEVEL.keys() | known_inside, constant


@pytest.mark.parametrize("name", ["vits", "transfer/knn", "ds_configs/vits.json"])
def test_a_shipped_run_file_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind: RunKind = "transfer" if "transfer" in name else "cmae"
    assert read_run(name, kind=kind).out == Path("runs", Path(name).stem)


@pytest.mark.parametrize("name", ["vits.json", "knn", "../ds_configs/vits.json"])
def test_a_name_that_is_not_quite_a_shipped_one_is_not_taken_for_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="ds_configs"):
        read_run(name)


def test_a_file_of_ones_own_goes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vits").write_text("[]")
    with pytest.raises(ConfigError, match="a run file is one JSON object"):
        read_run("vits")
