"""Training states: complete or not there, and exact to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.core.errors import ConfigError
from cmae_scale.engine import checkpoint
from cmae_scale.engine.checkpoint import check_stamp, find_newest

pytestmark = pytest.mark.dist

PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_and_resume_equals_straight_through_bit_for_bit(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
    ranks: int,
    stage: int,
    precision: str,
) -> None:
    def run(folder: str, **changes: Any) -> Any:
        return tiny_run(
            ranks=ranks, stage=stage, cmae={"out": str(tmp_path / folder), **changes}, **PRECISIONS[precision]
        )

    straight = on_ranks(lambda: train_tiny(run("straight"), steps=4), ranks=ranks)
    on_ranks(lambda: train_tiny(run("stopped"), steps=2, save_at=2), ranks=ranks)
    resumed = on_ranks(lambda: train_tiny(run("stopped"), steps=4), ranks=ranks)
    for whole, part in zip(straight, resumed, strict=True):
        assert part["first_step"] == 2
        for step in (2, 3):
            assert torch.equal(part["losses"][step], whole["losses"][step]), f"losses of step {step}"
        for name, value in whole["weights"].items():
            assert torch.equal(part["weights"][name], value), name


@pytest.fixture
def saved(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> Path:
    """A run folder with the states of steps 1 and 2."""
    run = tiny_run()
    on_ranks(lambda: [train_tiny(run, steps=step, save_at=step) for step in (1,)], ranks=1)
    on_ranks(lambda: train_tiny(run, steps=2, save_at=2), ranks=1)
    folder: Path = run.out / "checkpoints"
    return folder


def test_the_newest_committed_state_counts_and_nothing_else(saved: Path) -> None:
    assert find_newest(saved) == saved / "step_00000002"
    assert (saved / "latest").read_text() == "step_00000002"
    shutil.copytree(saved / "step_00000002", saved / "step_00000009.part")
    (saved / "latest").unlink()
    assert find_newest(saved) == saved / "step_00000002"
    shutil.rmtree(saved / "step_00000002")
    assert find_newest(saved) == saved / "step_00000001"
    assert find_newest(saved / "none") is None


@pytest.mark.parametrize(
    "moment", ["after the files", "before the rename", "before latest", "before dropping"]
)
def test_a_crash_while_saving_leaves_a_whole_state(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    place = {
        "after the files": (checkpoint, "write_text"),
        "before the rename": (checkpoint, "sync_tree"),
        "before latest": (checkpoint, "sync"),
        "before dropping": (checkpoint, "_drop_old"),
    }[moment]

    def crash(*args: Any, **options: Any) -> None:
        raise SystemExit("power cut")

    run = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(*place, crash)
        with pytest.raises(AssertionError, match="power cut"):
            on_ranks(lambda: train_tiny(run, steps=3, save_at=3), ranks=1)
    expected = 3 if moment in ("before latest", "before dropping") else 2
    assert on_ranks(lambda: train_tiny(run, steps=5, save_at=5), ranks=1)[0]["first_step"] == expected
    assert sorted(path.name for path in saved.iterdir() if path.is_dir())[-1] == "step_00000005"
    assert not list(saved.glob("*.part"))


def test_only_the_newest_states_are_kept(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    on_ranks(lambda: train_tiny(tiny_run(), steps=3, save_at=3), ranks=1)
    assert sorted(path.name for path in saved.glob("step_*")) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stage": 2}, "zero_stage 0, this run has 2"),
        ({"cmae": {"seed": 1}}, "seed 60, this run has 1"),
        ({"cmae": {"mask": {"ratio": 0.75}}}, "ratio 0.5, this run has mask ratio 0.75"),
        ({"bf16": {"enabled": True}}, "precision float32 products"),
    ],
)
def test_a_state_of_another_kind_of_run_is_refused(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
    change: dict[str, Any],
    told: str,
) -> None:
    with pytest.raises(AssertionError) as error:
        on_ranks(lambda: train_tiny(tiny_run(**change), steps=3), ranks=1)
    assert told in str(error.value)


def test_memory_and_speed_settings_may_change_on_resume(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    run = tiny_run(cmae={"model": {"remat": "full", "attention": "math"}})
    assert on_ranks(lambda: train_tiny(run, steps=3), ranks=1)[0]["first_step"] == 2


def test_a_damaged_description_is_told(saved: Path, tmp_path: Path) -> None:
    state = saved / "step_00000002" / "state.json"
    stamp = checkpoint.Stamp(**{k: v for k, v in json.loads(state.read_text()).items() if k != "step"})
    check_stamp(state.parent, stamp=stamp)
    state.write_text("{")
    with pytest.raises(ConfigError, match=r"state\.json is damaged"):
        check_stamp(state.parent, stamp=stamp)
