"""Going on from a state: to the bit on the same topology, within rounding on any other."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.checkpoints.commit import list_checkpoints, read_description
from cmae_scale.checkpoints.files import CheckpointReader

pytestmark = pytest.mark.dist

PRECISIONS = {
    "fp32": {},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
}
TOPOLOGIES = [(ranks, stage) for ranks in (1, 2) for stage in (0, 1, 2, 3)]
# sums over a batch are split differently, so fp32 rounds differently; see test_equality.py
LOSS = {"rtol": 2e-6, "atol": 2e-6}


@pytest.mark.slow_unless(ranks=2, precision="fp32")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_and_resume_equals_straight_through_bit_for_bit(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
    ranks: int,
    precision: str,
) -> None:
    def run(stage: int, folder: str) -> Any:
        out = str(tmp_path / f"{folder}{stage}")
        return tiny_run(ranks=ranks, stage=stage, cmae={"out": out}, **PRECISIONS[precision])

    def straight_and_begun() -> list[Any]:
        straight = []
        for stage in range(4):  # 3 last: it leaves a linear layer of its own behind in the process
            straight.append(train_tiny(run(stage, "straight"), steps=4))
            train_tiny(run(stage, "stopped"), steps=2, save_at=2)
        return straight

    def resumed() -> list[Any]:
        return [train_tiny(run(stage, "stopped"), steps=4) for stage in range(4)]

    wholes, parts = on_ranks(straight_and_begun, ranks=ranks), on_ranks(resumed, ranks=ranks)
    for whole, part in (
        (w, p) for ws, ps in zip(wholes, parts, strict=True) for w, p in zip(ws, ps, strict=True)
    ):
        assert part["first_step"] == 2
        for step in (2, 3):
            assert torch.equal(part["losses"][step], whole["losses"][step]), f"losses of step {step}"
        for name, value in whole["weights"].items():
            assert torch.equal(part["weights"][name], value), name


def read_tensors(state: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter's weight and optimizer states as a whole, however the state is cut."""
    reader = CheckpointReader([state / name for name in read_description(state)["files"]])
    for name, count in sorted(reader.parameters.items()):
        for kind in ("weight", *reader.optimizer_kinds):
            if reader.has(kind, name):
                yield f"{kind}/{name}", reader.read(kind, name, 0, count)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for states that outlive one test."""
    return tmp_path_factory.mktemp("states")


@pytest.fixture
def begun(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    shelf: Path,
) -> Callable[[int, int], Path]:
    """`begun(ranks, stage)`: the state after two steps there."""

    def state(ranks: int, stage: int) -> Path:
        return shelf / f"{ranks}x{stage}" / "checkpoints" / "step_00000002"

    def begin(ranks: int) -> None:
        def train() -> None:
            for stage in range(4):
                out = state(ranks, stage).parent.parent
                train_tiny(tiny_run(ranks=ranks, stage=stage, cmae={"out": str(out)}), steps=2, save_at=2)

        on_ranks(train, ranks=ranks)

    for ranks in (1, 2):
        if not state(ranks, 0).exists():
            begin(ranks)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_any_rank_count_and_stage_goes_on_from_any_other(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    begun: Callable[[int, int], Path],
    tmp_path: Path,
    ranks: int,
) -> None:
    """All 64 pairs of topologies: what is saved again is the same to the bit, and the losses continue."""

    def out(source: tuple[int, int], stage: int) -> Path:
        return tmp_path / f"{source[0]}x{source[1]} to {ranks}x{stage}"

    def go_on() -> dict[Any, Any]:
        answers = {}
        for stage in range(4):
            for source in TOPOLOGIES:
                folder = out(source, stage) / "checkpoints"
                if int(__import__("os").environ["RANK"]) == 0:
                    folder.mkdir(parents=True)
                    (folder / "step_00000002").symlink_to(begun(*source))
                run = tiny_run(ranks=ranks, stage=stage, cmae={"out": str(out(source, stage))})
                answers[source, stage] = train_tiny(run, steps=3, resave_at=2)
        return answers

    reference = on_ranks(lambda: train_tiny(tiny_run(), steps=3), ranks=1)[0]["losses"][2]
    answers = on_ranks(go_on, ranks=ranks)
    for stage in range(4):
        for source in TOPOLOGIES:
            given = [answer[source, stage] for answer in answers]
            assert all(answer["first_step"] == 2 for answer in given)
            loss = torch.stack([answer["losses"][2] for answer in given]).mean(0)
            torch.testing.assert_close(loss, reference, **LOSS)
            again = dict(read_tensors(out(source, stage) / "again" / "step_00000002"))
            for name, value in read_tensors(begun(*source)):
                assert torch.equal(again[name], value), f"{name}, {source} to {(ranks, stage)}"


def test_one_run_moves_from_two_ranks_to_one_and_back(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
) -> None:
    never_moved = tiny_run(cmae={"out": str(tmp_path / "never moved")})
    straight = on_ranks(lambda: train_tiny(never_moved, steps=6), ranks=1)[0]["losses"]
    journey = [(2, 2, 2), (1, 0, 4), (2, 3, 6)]  # ranks, stage, until step
    losses: dict[int, torch.Tensor] = {}
    notices: list[str] = []
    for ranks, stage, until in journey:
        run = tiny_run(ranks=ranks, stage=stage)
        answers = on_ranks(lambda: train_tiny(run, steps=until, save_at=until), ranks=ranks)
        notices += answers[0]["notices"]
        for step in answers[0]["losses"]:
            losses[step] = torch.stack([answer["losses"][step] for answer in answers]).mean(0)
    assert list(losses) == list(range(6))
    for step, loss in losses.items():
        torch.testing.assert_close(loss, straight[step], **LOSS)
    assert "the checkpoint was written with ZeRO stage 2, now 0" in notices
    assert "the checkpoint was written with ranks 1, now 2" in notices


@pytest.mark.slow_unless(target="fp32")
@pytest.mark.parametrize("target", ["fp32", "autocast", "bf16"])
def test_a_bf16_engines_masters_are_kept_whole_in_any_precision(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    tmp_path: Path,
    target: str,
) -> None:
    """Stage 1 has an optimizer of its own for bf16; from there to stages 0 and 3 nothing is rounded."""
    source = tiny_run(ranks=2, stage=1, **PRECISIONS["bf16"])
    on_ranks(lambda: train_tiny(source, steps=2, save_at=2), ranks=2)
    state = list_checkpoints(source.out / "checkpoints")[0]
    before = dict(read_tensors(state))
    # no value of a trained weight has come from bf16: its lower 16 bits are in use
    weights = before["weight/online_encoder.blocks.0.attn.qkv.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())
    target_weights = before["weight/target_encoder.blocks.0.attn.qkv.weight"]
    assert not torch.equal(target_weights, target_weights.bfloat16().float())
    for stage in (0, 3):
        run = tiny_run(ranks=2, stage=stage, **PRECISIONS[target])
        answers = on_ranks(lambda: train_tiny(run, steps=3, resave_at=2), ranks=2)
        assert answers[0]["first_step"] == 2
        again = dict(read_tensors(source.out / "again" / "step_00000002"))
        for name, value in before.items():
            assert torch.equal(again[name], value), name
