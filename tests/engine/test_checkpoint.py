"""Training states: complete or not there, and exact to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.core.world import World
from cmae_scale.engine.states import checkpoint
from cmae_scale.engine.states.checkpoint import find_damage, list_states

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
    assert list_states(saved) == [saved / "step_00000002", saved / "step_00000001"]
    assert (saved / "latest").read_text() == "step_00000002"
    shutil.copytree(saved / "step_00000002", saved / "step_00000009.part")
    (saved / "latest").unlink()
    assert list_states(saved)[0] == saved / "step_00000002"
    assert list_states(saved / "none") == []


@pytest.mark.parametrize("moment", ["describe_files", "write_text", "sync_tree", "sync"])
def test_a_crash_while_saving_leaves_a_whole_state(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    def crash(*args: Any, **options: Any) -> None:
        raise SystemExit("power cut")

    run = tiny_run()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, crash)
        with pytest.raises(AssertionError, match="power cut"):
            on_ranks(lambda: train_tiny(run, steps=3, save_at=3), ranks=1)
    expected = 3 if moment == "sync" else 2  # it comes after the rename
    assert on_ranks(lambda: train_tiny(run, steps=5, save_at=5), ranks=1)[0]["first_step"] == expected
    assert list_states(saved)[0].name == "step_00000005"
    assert not list(saved.glob("*.part"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_full_disk_on_one_rank_ends_neither_training_nor_older_states(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
) -> None:
    run = tiny_run(ranks=2, stage=stage)
    on_ranks(lambda: train_tiny(run, steps=1, save_at=1), ranks=2)

    def train() -> Any:
        import os

        original, rank = torch.save, int(os.environ["RANK"])

        def full(*args: Any, **options: Any) -> None:
            if rank == (0 if stage == 0 else 1):
                raise RuntimeError("unexpected pos 64 vs 0: no space left on device")
            original(*args, **options)

        torch.save = full
        try:
            return train_tiny(run, steps=3, save_at=2)
        finally:
            torch.save = original

    for answer in on_ranks(train, ranks=2):
        assert list(answer["losses"]) == [1, 2]
        assert "no space left" in answer["failed"]
    assert [path.name for path in list_states(run.out / "checkpoints")] == ["step_00000001"]
    assert not list((run.out / "checkpoints").glob("*.part"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_and_the_state_before_is_taken(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
    damage: str,
) -> None:
    run = tiny_run(ranks=2, stage=3)
    on_ranks(lambda: train_tiny(run, steps=1, save_at=1), ranks=2)
    on_ranks(lambda: train_tiny(run, steps=2, save_at=2), ranks=2)
    newest = list_states(run.out / "checkpoints")[0]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 5  # two ranks' weights and optimizer states, and the description
    for file in files:
        content = file.read_bytes()
        match damage:
            case "flip":
                middle = len(content) // 2
                file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case "cut":
                file.write_bytes(content[:-1])
            case "remove":
                file.unlink()
        found = find_damage(newest, world=World())
        if file.name == "state.json" and found is None:  # a blank or a digit of the step: no file is affected
            json.loads(file.read_text())
        else:
            assert found is not None, file
            assert file.name in found
        file.write_bytes(content)
    assert find_damage(newest, world=World()) is None
    (newest / files[0].name).write_bytes(b"")
    for answer in on_ranks(lambda: train_tiny(run, steps=3), ranks=2):
        assert answer["first_step"] == 1
        assert "so an older state was taken" in answer["notices"][0]


def test_when_every_state_is_damaged_training_does_not_start_over(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    for state in list_states(saved):
        (state / "state.json").write_text("{")
    with pytest.raises(AssertionError, match="is whole"):
        on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)


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
