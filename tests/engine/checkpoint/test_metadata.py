"""What of a state's description must match the run that goes on from it, and how a difference is told."""

from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.run_file import Run, RunKind
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.checkpoint.metadata import CheckpointMetadata, build_metadata
from cmae_scale.engine.setup import describe_kind

PLAN = {"images": 1300, "shards": 13, "streams": 8, "shuffle_window": 256, "order": "a1b2"}
STATE = Path("run/checkpoints/step_00000004")


SHARDS = {"shards": "x", "val_shards": "y"}


def metadata(
    kind: RunKind = "cmae",
    *,
    data: Any = PLAN,
    seed: int = 1,
    data_settings: dict[str, Any] = SHARDS,
    **sections: Any,
) -> CheckpointMetadata:
    settings: CmaeConfig | TransferConfig
    tree = {"data": data_settings, **sections}
    if kind == "cmae":
        settings = CmaeConfig.model_validate({"model": {"encoder": "vit_base"}, **tree})
    else:
        settings = TransferConfig.model_validate(
            {"encoder": {"place": "x"}, "task": {"finetune": {}}, **tree}
        )
    run = Run(Path("run.json"), settings, {"train_batch_size": 8})
    return build_metadata(run, kind={"seed": seed, "data": data}, ranks=1, precision="float32", attention={})


def compare(old: CheckpointMetadata, new: CheckpointMetadata, *, changes_allowed: bool = False) -> list[str]:
    return new.compare(vars(old), path=STATE, changes_allowed=changes_allowed)


def test_the_same_run_has_nothing_to_tell() -> None:
    assert compare(metadata(), metadata()) == []


@pytest.mark.parametrize("kind", ["cmae", "transfer"])
def test_where_and_how_fast_a_run_runs_may_change_without_a_word(kind: RunKind) -> None:
    moved = metadata(
        kind,
        out="elsewhere",
        data_settings={**SHARDS, "workers": 1, "prefetch": 9, "cache": "local", "cache_gib": 1.0},
        monitor={"log_every": 3},
        checkpoint={"every": "1ep", "keep": 5},
    )
    assert compare(metadata(kind), moved) == []


@pytest.mark.parametrize("kind", ["cmae", "transfer"])
def test_a_setting_of_the_method_that_changed_is_told(kind: RunKind) -> None:
    (told,) = compare(metadata(kind), metadata(kind, schedule={"base_lr": 1.0}))
    assert f"settings changed since step_00000004: {kind}.schedule.base_lr " in told


def test_what_only_rounds_otherwise_is_no_other_run_and_is_told() -> None:
    def settings(**model: Any) -> Run:
        tree = {"model": {"encoder": "vit_base", **model}, "data": SHARDS}
        return Run(Path("run.json"), CmaeConfig.model_validate(tree), {"train_batch_size": 8})

    plain, short = (describe_kind(settings(skip_redundant=skip), data_order="a") for skip in (False, True))
    assert plain == short
    (told,) = compare(metadata(), metadata(model={"encoder": "vit_base", "skip_redundant": True}))
    assert told == "settings changed since step_00000004: cmae.model.skip_redundant False -> True"


def test_other_data_is_told_in_images_and_shards() -> None:
    other = {**PLAN, "images": 1200, "shards": 12, "order": "c3d4"}
    with pytest.raises(ConfigError) as error:
        compare(metadata(), metadata(data=other))
    told = str(error.value)
    assert "was written with data.images 1300 (now 1200), data.shards 13 (now 12): " in told
    assert "a1b2" not in told
    assert "c3d4" not in told


def test_the_same_counts_in_another_order_are_told_in_words() -> None:
    with pytest.raises(ConfigError, match="another order of them") as error:
        compare(metadata(), metadata(data={**PLAN, "order": "c3d4"}))
    assert "c3d4" not in str(error.value)


def test_what_else_makes_it_another_run_is_listed_beside() -> None:
    with pytest.raises(ConfigError, match=r"seed 1 \(now 2\), data.streams 8 \(now 4\)"):
        compare(metadata(), metadata(seed=2, data={**PLAN, "streams": 4, "order": "x"}))


def test_a_state_from_before_counts_were_written_goes_on() -> None:
    assert compare(metadata(data="a1b2"), metadata()) == []
    with pytest.raises(ConfigError, match="another order of them"):
        compare(metadata(data="ffff"), metadata())
