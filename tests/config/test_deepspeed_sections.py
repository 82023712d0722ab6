import json
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.deepspeed_keys import LOGGED, UNSERVED
from cmae_scale.config.precision import write_autocast
from cmae_scale.config.run_file import Run, RunKind, dump_run, read_run, resolve_run
from cmae_scale.core.errors import ConfigError

CMAE = {"model": {"encoder": "vit_base"}, "data": {"shards": "shards/x"}}
TRANSFER = {
    "encoder": {"place": "x"},
    "task": {"finetune": {}},
    "data": {"shards": "a", "val_shards": "b"},
}
BATCH = {"train_batch_size": 256, "train_micro_batch_size_per_gpu": 64}
ADAMW = {"type": "AdamW", "params": {}}


def read(folder: Path, deepspeed: dict[str, Any], kind: RunKind = "cmae", **task: Any) -> Run:
    path = folder / "run.json"
    ours = CMAE if kind == "cmae" else {**TRANSFER, **({"task": task} if task else {})}
    path.write_text(json.dumps({**BATCH, "optimizer": ADAMW, **deepspeed, kind: ours}))
    return read_run(path, kind=kind)


def resolve(run: Run) -> Any:
    batch = plan_batch(run.deepspeed, ranks=1)
    return resolve_run(run, batch=batch, total_steps=1000, warmup_steps=100).deepspeed


@pytest.mark.parametrize("kind", ["cmae", "transfer"])
@pytest.mark.parametrize("name", sorted(UNSERVED.keys() | LOGGED.keys()))
@pytest.mark.parametrize("value", [True, {"enabled": True}, {"inner": {"size": 2}}])
def test_a_section_that_nothing_here_serves_is_refused(
    name: str, value: Any, kind: RunKind, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, {name: value}, kind)
    assert f'do nothing here, drop them: "{name}" (' in str(error.value)
    assert ("transfer." if kind == "cmae" else "cmae.data") not in str(error.value)


def test_all_sections_that_do_nothing_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"pipeline" .*, "hybrid_engine" .*, "comms_logger" '):
        read(
            tmp_path,
            {
                "hybrid_engine": {"enabled": True},
                "pipeline": {"stages": 2},
                "comms_logger": {"enabled": True, "verbose": True},
            },
        )


@pytest.mark.parametrize("name", sorted(UNSERVED.keys() | LOGGED.keys()))
@pytest.mark.parametrize("value", [False, None, {}, {"enabled": False, "size": 2}])
def test_a_section_that_is_off_is_dropped(name: str, value: Any, tmp_path: Path) -> None:
    """DeepSpeed itself refuses some of them whatever they say."""
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = resolve(read(tmp_path, {name: value}))
    assert name not in resolved
    DeepSpeedConfig(write_autocast(resolved, "float32"))


def test_sections_that_log_may_stay_where_the_log_is_shown(tmp_path: Path) -> None:
    run = read(
        tmp_path,
        {"log_level": "info", "dump_state": True, "comms_logger": {"enabled": True, "verbose": True}},
    )
    assert run.deepspeed.keys() >= {"dump_state", "comms_logger"}
    with pytest.raises(ConfigError, match="comms_logger"):
        read(tmp_path, {"log_level": "info", "comms_logger": {"enabled": True}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gradient_clipping", -1),
        ("gradient_clipping", "1.0"),
        ("gradient_clipping", True),
        ("gradient_predivide_factor", 0),
        ("steps_per_print", 0),
        ("prescale_gradients", "false"),
        ("wall_clock_breakdown", "no"),
    ],
)
def test_a_value_that_deepspeed_would_misread_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"run.json: {name}: input should be .*, not "):
        read(tmp_path, {name: value})


AUTOS = {
    "gradient_clipping": 0.0,
    "optimizer.params.lr": 1.5e-4,
    "optimizer.params.betas": [0.9, 0.95],
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.05,
    "scheduler.params.warmup_min_lr": 1.5e-8,
    "scheduler.params.warmup_max_lr": 1.5e-4,
    "scheduler.params.warmup_num_steps": 100,
    "scheduler.params.total_num_steps": 1000,
    "gradient_accumulation_steps": 4,
    "zero_optimization.reduce_bucket_size": None,
    "zero_optimization.stage3_prefetch_bucket_size": None,
    "steps_per_print": None,
    "prescale_gradients": None,
    "fp16.loss_scale_window": None,
    "communication_data_type": None,
}


def with_autos(*places: str) -> dict[str, Any]:
    tree: dict[str, Any] = {"optimizer": json.loads(json.dumps(ADAMW))}
    for place in places:
        *sections, name = place.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = "auto"
    if "scheduler" in tree:
        tree["scheduler"]["type"] = "WarmupDecayLR"
    return tree


@pytest.mark.parametrize("place", AUTOS)
def test_auto_comes_to_what_follows_or_to_the_default(place: str, tmp_path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    node = resolve(read(tmp_path, with_autos(place)))
    DeepSpeedConfig(write_autocast(node, "float32"))
    for name in place.split("."):
        node = {} if node is None else node.get(name)
    assert node == (AUTOS[place] if AUTOS[place] is None else pytest.approx(AUTOS[place]))


@pytest.mark.parametrize(
    ("task", "found"),
    [
        ({"finetune": {}}, {"betas": [0.9, 0.999], "weight_decay": 0.05}),
        ({"linear": {}}, {"momentum": 0.9, "weight_decay": 0.0}),
    ],
)
def test_auto_follows_the_recipe_of_the_task(
    task: dict[str, Any], found: dict[str, Any], tmp_path: Path
) -> None:
    tree = with_autos(*(f"optimizer.params.{name}" for name in found))
    tree["optimizer"]["type"] = "AdamW" if "betas" in found else "LARS"
    run = read(tmp_path, tree, "transfer", **task)
    assert resolve(run)["optimizer"]["params"].items() >= found.items()


def test_what_cannot_be_auto_is_listed_at_once(tmp_path: Path) -> None:
    sizes = ["train_batch_size", "train_micro_batch_size_per_gpu"]
    others = [
        "optimizer.params.nesterov",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer.device",
        "data_types.grad_accum_dtype",
    ]
    tree = with_autos(*sizes, *others)
    tree["optimizer"]["type"] = "SGD"
    with pytest.raises(ConfigError) as error:
        read(tmp_path, tree)
    assert all(place in str(error.value) for place in [*sizes, *others])
    assert "\n" not in str(error.value)


def test_one_batch_size_is_enough_for_the_others_to_follow(tmp_path: Path) -> None:
    for given in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        autos = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} - {
            given
        }
        resolved = resolve(read(tmp_path, {**with_autos(*autos), given: 32}))
        assert resolved["train_batch_size"] == 32


def test_nothing_is_asked_for_where_nothing_is_trained(tmp_path: Path) -> None:
    read(tmp_path, with_autos("train_batch_size", "train_micro_batch_size_per_gpu"), "transfer", knn={})


@pytest.mark.parametrize(
    ("params", "zero", "chosen"),
    [
        ({}, {}, (True, True)),
        ({"torch_adam": False}, {}, (False, None)),
        ({"torch_adam": True}, {}, (True, None)),
        ({"bias_correction": False}, {}, (None, None)),  # PyTorch's has no such argument
        ({}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, (None, None)),
    ],
)
def test_adam_needs_no_compiler_unless_the_file_chooses_deepspeeds(
    params: dict[str, Any], zero: dict[str, Any], chosen: tuple[bool | None, ...], tmp_path: Path
) -> None:
    optimizer = {"type": "AdamW", "params": params}
    resolved = resolve(read(tmp_path, {"optimizer": optimizer, "zero_optimization": zero}))
    found = resolved["optimizer"]["params"]
    assert (found.get("torch_adam"), found.get("fused")) == chosen


@pytest.fixture
def front_end_file(repository: Path) -> Path:
    path = repository.parent / "shared" / "cases" / "deepspeed_auto.json"
    if not path.is_file():
        pytest.skip("the cases of ../shared/cases are not here")
    return path


def test_a_file_of_another_front_end_needs_its_batch_size_alone(front_end_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"for train_batch_size \(beside train_micro_batch_size_per_gpu\):"):
        read_run(front_end_file)
    run = read_run(front_end_file, ["train_batch_size=32"])
    settled = resolve_run(run, batch=plan_batch(run.deepspeed, ranks=2), total_steps=6, warmup_steps=2)
    again = tmp_path / "config.json"
    again.write_text(dump_run(settled))
    assert read_run(again).deepspeed == settled.deepspeed
    lacking = {name: value for name, value in settled.deepspeed.items() if name != "torch_autocast"}
    assert '"auto"' not in json.dumps(lacking)


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro", [64, 128, 256])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("more", "zero"),
    [({}, {}), ({"bf16": {"enabled": True}}, {}), ({"bf16": {"enabled": False}}, {}), ({}, OFFLOADED)],
)
def test_one_rank_runs_without_zero_what_is_not_shared(
    tmp_path: Path, stage: int, micro: int, ranks: int, more: dict[str, Any], zero: dict[str, Any]
) -> None:
    zero = {"stage": stage, "overlap_comm": True, **zero}
    sizes = {"train_batch_size": micro * ranks * 2, "train_micro_batch_size_per_gpu": micro}
    run = read(tmp_path, {"zero_optimization": zero, **sizes, **more})
    batch = plan_batch(run.deepspeed, ranks=ranks)
    resolved = resolve_run(run, batch=batch, total_steps=1000, warmup_steps=100).deepspeed
    is_dropped = ranks == 1 and stage in (1, 2) and not more.get("bf16", {}).get("enabled") and len(zero) == 2
    assert resolved["zero_optimization"] == {**zero, "stage": 0 if is_dropped else stage}
