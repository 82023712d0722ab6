"""A state that is written while training goes on is the one that training would have waited for."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from cmae_scale.checkpoints.commit import describe_file, list_checkpoints
from cmae_scale.checkpoints.files import write_rank_file
from cmae_scale.config.batches import plan_batch
from cmae_scale.core.world import World
from cmae_scale.engine.checkpoint import save_load
from cmae_scale.engine.checkpoint.save_load import Snapshot, check_checkpoint
from cmae_scale.engine.process import group
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.planning.forecast import describe_job
from cmae_scale.sizing.zero import Job, count_snapshot

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_a_file_has_the_bytes_that_safetensors_writes(
    tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "rank.safetensors"
    made = {}
    for seed, (name, (shape, dtype, is_turned)) in enumerate(tensors.items()):
        rng = torch.Generator().manual_seed(seed)
        tensor = torch.randint(0, 2, shape, generator=rng).to(dtype)
        made[name] = tensor.movedim(0, -1) if is_turned and shape else tensor  # strides of their own
    entry = write_rank_file(path, made)
    assert path.read_bytes() == save({name: tensor.contiguous() for name, tensor in made.items()})
    assert entry == describe_file(path)
    for name, tensor in load_file(path).items():
        assert tensor.dtype == made[name].dtype
        assert torch.equal(tensor, made[name])


def test_a_file_of_many_blocks_is_hashed_as_it_lies_there(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path / "rank", {"weight/a@0": torch.arange(3_000_001.0)})
    assert entry == describe_file(tmp_path / "rank")


def test_a_snapshot_keeps_what_was_there_in_the_same_memory() -> None:
    snapshot, weight, count = Snapshot(), torch.arange(5.0), torch.tensor(1.0)
    first = snapshot.take({"weight": weight, "count": count})
    place = first["weight"].data_ptr()
    weight += 1
    assert first["weight"].tolist() == [0, 1, 2, 3, 4]
    again = snapshot.take({"weight": weight, "bf16": weight.bfloat16()})
    assert again["weight"].data_ptr() == place
    assert again["weight"].tolist() == [1, 2, 3, 4, 5]
    assert again.keys() == {"weight", "bf16"}


def plan_job(run: Any) -> Job:
    return describe_job(run, batch=plan_batch(run.deepspeed, ranks=2), ranks=2, device="cpu")


def hold_writing(now: dict[str, int], *, rank: int, until_step: int) -> None:
    """Have this rank's files be written only once training has come to a step."""
    original = save_load.write_rank_file

    def write(path: Path, tensors: Any) -> Any:
        waited_s = 0.0
        while path.name == f"rank_{rank:05d}.safetensors" and now["step"] < until_step and waited_s < 20:
            time.sleep(0.01)
            waited_s += 0.01
        return original(path, tensors)

    save_load.write_rank_file = write


@pytest.mark.dist
@pytest.mark.slow_unless(stage=1, slow=1)
@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_steps_go_on_beside_and_the_state_is_that_of_its_own_step(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    run_now: dict[str, int],
    tmp_path: Path,
    stage: int,
    slow: int,
) -> None:
    """One rank is slow: the state of step 2 counts when it is ready, one step later or two, on all ranks."""

    def run(name: str, *, beside: bool) -> Any:
        settings = {"out": str(tmp_path / name), "checkpoint": {"beside": beside, "keep": 9}}
        return tiny_run(ranks=2, stage=stage, cmae=settings)

    def train_beside() -> Any:
        hold_writing(run_now, rank=slow, until_step=3)
        committed, original = [], save_load._commit

        def note(part: Path, *args: Any, **options: Any) -> None:
            committed.append((part.name, run_now["step"]))
            original(part, *args, **options)

        save_load._commit = note
        return run_loop(run("beside", beside=True), save_every=2, end=6), committed

    waited = on_ranks(lambda: run_loop(run("waited", beside=False), save_every=2, end=6), ranks=2)
    beside = on_ranks(train_beside, ranks=2)
    for (answer, committed), whole in zip(beside, waited, strict=True):
        assert answer["error"] is None
        assert answer["said"] == whole["said"]
        for name, weight in whole["weights"].items():
            assert torch.equal(answer["weights"][name], weight), name
        if committed:  # of the first rank; before the state of step 4 begins, or when it is ready
            assert committed[0][0] == "step_00000002.part"
            assert committed[0][1] >= 3
            assert [name for name, _ in committed] == [f"step_0000000{step}.part" for step in (2, 4, 6)]
    assert beside[0][1]
    share_bytes = count_snapshot(plan_job(run("beside", beside=True)))
    assert count_snapshot(plan_job(run("waited", beside=False))) == 0
    for step in (2, 4, 6):
        ours, theirs = (tmp_path / name / f"checkpoints/step_0000000{step}" for name in ("beside", "waited"))
        assert check_checkpoint(ours, world=World())[0] is None
        for share in ("rank_00000.safetensors", "rank_00001.safetensors"):
            assert (ours / share).read_bytes() == (theirs / share).read_bytes()
        shares = [load_file(share) for share in ours.glob("rank_*")]
        copied_bytes = sum(tensor.nbytes for share in shares for tensor in share.values())
        assert copied_bytes == pytest.approx(2 * share_bytes, rel=0.03)  # as `plan` has it, without buffers


@pytest.mark.dist
def test_a_kill_while_a_state_is_written_leaves_the_one_before(
    on_ranks: Callable[..., list[Any]],
    killed_on_ranks: Callable[..., None],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    run_now: dict[str, int],
    tmp_path: Path,
) -> None:
    def run(name: str) -> Any:
        settings = {"out": str(tmp_path / name), "checkpoint": {"beside": True}}
        return tiny_run(ranks=2, stage=1, cmae=settings)

    def die() -> None:
        import os
        import signal

        original = save_load.write_rank_file

        def write(path: Path, tensors: Any) -> Any:
            while path.parent.name == "step_00000004.part" and run_now["step"] < 5:
                time.sleep(0.01)
            if path.parent.name == "step_00000004.part":
                os.kill(os.getpid(), signal.SIGKILL)
            return original(path, tensors)

        save_load.write_rank_file = write
        run_loop(run("killed"), save_every=2, end=6)

    killed_on_ranks(die, ranks=2)
    assert [path.name for path in list_checkpoints(tmp_path / "killed/checkpoints")] == ["step_00000002"]
    resumed = on_ranks(lambda: run_loop(run("killed"), save_every=2, end=6), ranks=2)
    whole = on_ranks(lambda: run_loop(run("whole"), save_every=2, end=6), ranks=2)
    assert resumed[0]["first_step"] == 2
    for name, weight in whole[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], weight), name
    assert not list((tmp_path / "killed/checkpoints").glob("*.part"))


@pytest.mark.dist
def test_a_disk_that_is_full_is_told_at_a_later_step(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], run_loop: Callable[..., Any]
) -> None:
    run = tiny_run(ranks=2, cmae={"checkpoint": {"beside": True}})

    def train() -> Any:
        original = save_load.write_rank_file

        def write(path: Path, tensors: Any) -> Any:
            if path.parent.name == "step_00000004.part" and path.name == "rank_00001.safetensors":
                raise OSError(28, "No space left on device")
            return original(path, tensors)

        save_load.write_rank_file = write
        return run_loop(run, save_every=2, end=6)

    for answer in on_ranks(train, ranks=2):
        assert answer["error"] is None
        [told] = answer["said"]
        assert told.startswith("warning: step 4 is not saved ([Errno 28] No space left on device)")
    states = [path.name for path in list_checkpoints(run.out / "checkpoints")]
    assert states == ["step_00000006", "step_00000002"]


@pytest.mark.dist
def test_who_is_asked_to_leave_waits_for_what_is_being_written_and_saves_what_is_new(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    run_loop: Callable[..., Any],
    run_now: dict[str, int],
) -> None:
    run = tiny_run(ranks=2, cmae={"checkpoint": {"beside": True}})

    def train() -> Any:
        original = save_load.write_rank_file
        with StopRequest() as stop:
            stop.hold()
            group.StopRequest = lambda: stop

            def write(path: Path, tensors: Any) -> Any:
                if path.name == "rank_00001.safetensors" and path.parent.name == "step_00000002.part":
                    while run_now["step"] < 3:
                        time.sleep(0.01)
                    stop.tell("SIGTERM")
                    time.sleep(1)  # the others know by then
                return original(path, tensors)

            save_load.write_rank_file = write
            return run_loop(run, save_every=2, end=6)

    for answer in on_ranks(train, ranks=2):
        assert "InterruptedRunError" in answer["error"]
        assert answer["said"] == []
    newest, older = [path.name for path in list_checkpoints(run.out / "checkpoints")]
    assert newest in ("step_00000003", "step_00000004")  # the steps that were done when it was asked
    assert older == "step_00000002"
