"""A state is there as a whole or not at all: kills at every point, damage to every file, full disks."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.checkpoints import commit
from cmae_scale.checkpoints.commit import list_checkpoints, read_description
from cmae_scale.core.world import World
from cmae_scale.engine.checkpoint import save_load
from cmae_scale.engine.checkpoint.save_load import check_checkpoint

pytestmark = pytest.mark.dist

# every step of the protocol, the rank that it is killed on, and the states of which one must be whole then
PROTOCOL = [
    (commit, "clear_leftovers", 0, 1),
    (save_load, "write_rank_file", 0, 1),
    (save_load, "write_rank_file", 1, 1),
    (save_load, "_name_files", 1, 2),  # all shares are written: the first rank needs no other
    (commit, "write_description", 0, 1),
    (commit, "commit", 0, 1),
    (commit, "sync", 0, 2),  # of the parent folder: the rename is done
    (commit, "point_latest", 0, 2),
    (commit, "drop_old", 0, 2),
]
COMMIT = PROTOCOL[4:7]


@pytest.mark.slow_unless(points=COMMIT)
@pytest.mark.parametrize(("stage", "points"), [(2, COMMIT), *((stage, PROTOCOL) for stage in range(4))])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_state(
    on_ranks: Callable[..., list[Any]],
    killed_on_ranks: Callable[..., None],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    whole_states: Callable[[Path], list[str]],
    tmp_path: Path,
    stage: int,
    points: list[Any],
) -> None:
    def run(out: str) -> Any:
        return tiny_run(ranks=2, stage=stage, cmae={"out": str(tmp_path / out)})

    def straight() -> Any:
        train_tiny(run("begun"), steps=1, save_at=1)
        return train_tiny(run("straight"), steps=3)

    expected = on_ranks(straight, ranks=2)
    for module, point, rank, newest in points:
        out = f"{point} on {rank}"
        shutil.copytree(tmp_path / "begun", tmp_path / out)

        def train() -> None:
            def die(*args: Any, **options: Any) -> None:
                if int(os.environ["RANK"]) == rank:
                    os.kill(os.getpid(), signal.SIGKILL)

            if point == "sync":
                module.sync = lambda path: die() if path.name == "checkpoints" else None
            else:
                original = getattr(module, point)

                def first_die(*args: Any, **options: Any) -> Any:
                    die()
                    return original(*args, **options)

                setattr(module, point, first_die)
            train_tiny(run(out), steps=2, save_at=2)

        killed_on_ranks(train, ranks=2)
        states = whole_states(tmp_path / out / "checkpoints")
        assert states[0] == f"step_0000000{newest}", f"{out}: {states}"
    for out in ("write_description on 0", "sync on 0"):  # goes on as if nothing had happened, and cleans up
        answers = on_ranks(lambda: train_tiny(run(out), steps=3, save_at=3), ranks=2)
        for answer, whole in zip(answers, expected, strict=True):
            assert torch.equal(answer["losses"][2], whole["losses"][2])
            for name, value in whole["weights"].items():
                assert torch.equal(answer["weights"][name], value), name
        assert not list((tmp_path / out / "checkpoints").glob("*.part"))
        assert whole_states(tmp_path / out / "checkpoints")[0] == "step_00000003"


def test_every_flipped_bit_of_the_description_is_found(saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    for name in (commit.DESCRIPTION, commit.SEAL):
        content = (newest / name).read_bytes()
        for place in range(len(content)):
            flipped = bytes([content[place] ^ (1 << place % 8)])
            (newest / name).write_bytes(content[:place] + flipped + content[place + 1 :])
            with pytest.raises(ValueError, match=r"damaged|cannot be read"):
                read_description(newest)
        for length in range(0, len(content), 97):
            (newest / name).write_bytes(content[:length])
            with pytest.raises(ValueError, match="damaged"):
                read_description(newest)
        (newest / name).write_bytes(content)
    assert check_checkpoint(newest, world=World())[0] is None


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "remove", "pickle"])
def test_damage_to_any_share_is_found_and_the_state_before_is_taken(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
    damage: str,
) -> None:
    newest = list_checkpoints(saved)[0]
    [share] = newest.glob("rank_*")
    content = share.read_bytes()
    positions = [0, 7, 8, 100, *range(1000, len(content), 4999), len(content) - 1]
    match damage:
        case "flip":
            spoiled = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in positions]
        case "cut":
            spoiled = [content[:at] for at in positions]
        case "longer":
            spoiled = [content + b"\0"]
        case "pickle":
            spoiled = [b"cos\nsystem\n(S'touch planted'\ntR."]
        case _:
            spoiled = [None]
    for bytes_now in spoiled:
        share.unlink(missing_ok=True)
        if bytes_now is not None:
            share.write_bytes(bytes_now)
        found = check_checkpoint(newest, world=World())[0]
        assert found is not None
        assert share.name in found
    [answer] = on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)
    assert answer["first_step"] == 1
    assert "so an older checkpoint was taken" in answer["notices"][0]
    assert not Path("planted").exists()


def test_a_share_that_is_no_safetensors_file_is_refused_even_if_its_hash_was_forged(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    newest = list_checkpoints(saved)[0]
    description = read_description(newest)
    [share] = newest.glob("rank_*")
    share.write_bytes(b"cos\nsystem\n(S'touch planted'\ntR.")
    description["files"][share.name] = commit.describe_file(share)
    commit.write_description(newest, description)
    with pytest.raises(AssertionError, match="is no safetensors file"):
        on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)
    assert not Path("planted").exists()


def test_a_description_cannot_name_files_outside_of_its_state(saved: Path) -> None:
    newest = list_checkpoints(saved)[0]
    description = read_description(newest)
    description["files"]["../../other.safetensors"] = {"bytes": 1, "sha256": "0"}
    commit.write_description(newest, description)
    assert "files.../../other.safetensors" in (check_checkpoint(newest, world=World())[0] or "")


def test_committed_states_count_and_nothing_else(saved: Path) -> None:
    assert [path.name for path in list_checkpoints(saved)] == ["step_00000002", "step_00000001"]
    assert (saved / "latest").read_text() == "step_00000002"
    shutil.copytree(saved / "step_00000002", saved / "step_00000009.part")
    for latest in ("", "step_00000007", "../elsewhere"):
        (saved / "latest").write_text(latest)
        assert list_checkpoints(saved)[0].name == "step_00000002"
    (saved / "latest").unlink()
    assert list_checkpoints(saved)[0].name == "step_00000002"
    assert list_checkpoints(saved / "none") == []


@pytest.mark.slow_unless(stage=3, full=1)
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_ends_neither_training_nor_older_states(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    stage: int,
    full: int,
) -> None:
    run = tiny_run(ranks=2, stage=stage)

    def train() -> Any:
        train_tiny(run, steps=1, save_at=1)
        original = save_load.write_rank_file

        def write(path: Path, tensors: Any) -> Any:
            entry = original(path, tensors)
            if path.name == f"rank_0000{full}.safetensors":
                path.write_bytes(path.read_bytes()[:100])
                raise OSError(28, "No space left on device")
            return entry

        save_load.write_rank_file = write
        return train_tiny(run, steps=3, save_at=2)

    for answer in on_ranks(train, ranks=2):
        assert list(answer["losses"]) == [1, 2]
        assert "No space left" in answer["failed"]
    assert [path.name for path in list_checkpoints(run.out / "checkpoints")] == ["step_00000001"]
    assert not list((run.out / "checkpoints").glob("*.part"))


def test_a_real_full_disk_is_told_and_survived(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> None:
    """Files may not grow beyond 60 kB here: what the system answers then goes through every layer."""
    run = tiny_run()

    def train() -> Any:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        return train_tiny(run, steps=2, save_at=1)

    [answer] = on_ranks(train, ranks=1)
    assert list(answer["losses"]) == [0, 1]
    assert "File too large" in answer["failed"]
    assert list_checkpoints(run.out / "checkpoints") == []


def test_when_every_state_is_damaged_training_does_not_start_over(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    for state in list_checkpoints(saved):
        (state / commit.DESCRIPTION).write_text("{")
    with pytest.raises(AssertionError, match="is whole"):
        on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)


def test_the_newest_states_and_every_third_are_kept(tmp_path: Path) -> None:
    for step in range(1, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    commit.drop_old(tmp_path, keep=2, keep_every_steps=3)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [8, 7, 6, 3]
    commit.drop_old(tmp_path, keep=2, keep_every_steps=None)
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [8, 7]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cmae": {"seed": 1}}, "was written with seed 60 (now 1)"),
        ({"cmae": {"mask": {"ratio": 0.75}}}, "mask.ratio 0.5 (now 0.75)"),
        ({"cmae": {"loss": {"weight": 0.0}}}, "loss.weight 1.0 (now 0.0)"),
        ({"cmae": {"checkpoint": {"resume": "anyway"}, "loss": {"weight": 0.0}}}, "is of another model"),
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


def test_changed_settings_are_listed(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    run = tiny_run(
        cmae={
            "model": {"remat": "full", "attention": "math"},
            "mask": {"ratio": 0.75},
            "checkpoint": {"resume": "anyway", "keep": 5},
        },
        gradient_clipping=3.0,
    )
    [answer] = on_ranks(lambda: train_tiny(run, steps=3), ranks=1)
    assert answer["first_step"] == 2
    [notice] = answer["notices"]
    assert notice.startswith("settings changed since step_00000002: ")
    for change in (
        "gradient_clipping 0.0 -> 3.0",
        "cmae.mask.ratio 0.5 -> 0.75",
        "cmae.model.remat none -> full",
    ):
        assert change in notice
    assert "checkpoint" not in notice


def test_a_state_that_must_be_there_is_missed(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> None:
    run = tiny_run(cmae={"checkpoint": {"resume": "required"}})
    with pytest.raises(AssertionError, match="holds no checkpoint to go on from"):
        on_ranks(lambda: train_tiny(run, steps=1), ranks=1)


def test_a_state_of_an_older_format_is_told(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    saved: Path,
) -> None:
    for state in list_checkpoints(saved):
        description = read_description(state)
        description["stamp"]["format"] = 1
        commit.write_description(state, description)
    with pytest.raises(AssertionError, match="has format 1, this version writes 2"):
        on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)


def test_the_description_is_readable_json(saved: Path) -> None:
    description = json.loads((list_checkpoints(saved)[0] / "state.json").read_text())
    assert description["step"] == 2
    assert description["stamp"]["run"]["cmae"]["seed"] == 60
    assert description["counters"]["global_steps"] == 2
