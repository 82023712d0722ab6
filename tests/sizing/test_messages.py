"""What ranks tell each other by formula, against the collectives that they really call."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmae_scale.config.batches import plan_batch
from cmae_scale.core import collectives
from cmae_scale.planning.forecast import describe_job
from cmae_scale.sizing import messages
from cmae_scale.sizing.messages import Talk, ask_neighbours, count_questions, count_sent, list_talks
from cmae_scale.sizing.zero import Job
from cmae_scale.tasks import evaluator
from cmae_scale.tasks.evaluator import build_bank, find_neighbours
from cmae_scale.tasks.features import Features
from tests.engine.conftest import tiny_run, train_tiny  # noqa: F401

KINDS = {
    "all_reduce": lambda tensor, *_: tensor,
    "all_gather_into_tensor": lambda whole, own: own,
    "all_to_all_single": lambda received, sent: sent,
    "reduce_scatter_tensor": lambda own, parts: parts,
}
Counted = Counter[tuple[str, str, str]]


def count_collectives() -> Counted:
    """A counter that goes on: calls and bytes brought, by the kind of collective and by who calls it."""
    import torch.distributed as dist

    counted: Counted = Counter()

    def watch(name: str) -> None:
        call, find = getattr(dist, name), KINDS[name]

        def talk(*tensors: torch.Tensor, **options: Any) -> Any:
            file = sys._getframe(1).f_code.co_filename
            own = find(*tensors, *(given for given in options.values() if isinstance(given, torch.Tensor)))
            who = "ours" if "cmae_scale" in file else "deepspeed"
            kind = name.removesuffix("_into_tensor").removesuffix("_single").removesuffix("_tensor")
            counted[who, kind, "calls"] += 1
            counted[who, kind, "bytes"] += own.numel() * own.element_size()
            return call(*tensors, **options)

        setattr(dist, name, talk)

    for name in KINDS:
        watch(name)
    return counted


def total(talks: list[Talk], what: str) -> Counter[tuple[str, str]]:
    """Calls and bytes of those talks by kind, as `count_collectives` counts."""
    summed: Counter[tuple[str, str]] = Counter()
    for talk in talks:
        if talk.when == what and talk.calls is not None:
            summed[talk.kind, "calls"] += talk.calls
            summed[talk.kind, "bytes"] += talk.own_bytes
    return summed


def describe(run: Any, *, ranks: int, device: Any = "cpu") -> Job:
    return describe_job(run, batch=plan_batch(run.deepspeed, ranks=ranks), ranks=ranks, device=device)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (0, 2), (2, 2)])
def test_a_step_makes_the_collectives_that_are_said(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],  # noqa: F811
    train_tiny: Callable[..., Any],  # noqa: F811
    ranks: int,
    stage: int,
    accumulation: int,
) -> None:
    run = tiny_run(
        ranks=ranks, stage=stage, accumulation=accumulation, cmae={"checkpoint": {"resume": "never"}}
    )

    def take(steps: int) -> Callable[[], Counted]:
        def train() -> Counted:
            counted = count_collectives()
            train_tiny(run, steps=steps)
            return counted

        return train

    short, long = (on_ranks(take(steps), ranks=ranks) for steps in (1, 2))
    said = list_talks(describe(run, ranks=ranks))
    expected = total([talk for talk in said if talk.what != "agreement"], "step")
    for one, two in zip(short, long, strict=True):
        step = {key: two[key] - one[key] for key in two}
        ours = {(kind, unit): count for (who, kind, unit), count in step.items() if who == "ours" and count}
        assert ours == dict(expected)
        reduced = step["deepspeed", "all_reduce", "bytes"]
        whole = next(talk for talk in said if talk.what == "gradients").own_bytes
        assert whole <= reduced <= whole + 64  # and a few numbers, such as whether any overflowed


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_of_the_average_are_brought_together_as_is_said(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],  # noqa: F811
    train_tiny: Callable[..., Any],  # noqa: F811
    ranks: int,
) -> None:
    run = tiny_run(ranks=ranks, stage=1, cmae={"checkpoint": {"resume": "never"}}, bf16={"enabled": True})

    def take(steps: int) -> Callable[[], int]:
        def train() -> int:
            counted = count_collectives()
            train_tiny(run, steps=steps)
            return counted["ours", "all_reduce", "bytes"]

        return train

    said = [talk for talk in list_talks(describe(run, ranks=ranks)) if talk.kind == "all_reduce"]
    assert "moving average" in [talk.what for talk in said]
    expected = sum(talk.own_bytes for talk in said if talk.what not in ("agreement", "gradients"))
    short, long = (on_ranks(take(steps), ranks=ranks) for steps in (1, 2))
    for one, two in zip(short, long, strict=True):
        assert expected <= two - one <= expected + 2  # filled up to whole numbers of four bytes


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_agreement_and_neighbours_make_the_collectives_that_are_said(
    on_ranks: Callable[..., list[Any]], ranks: int
) -> None:
    def ask() -> tuple[Counted, Counted]:
        from cmae_scale.engine.process.agreement import RankAgreement
        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.process.signals import StopRequest

        start_processes()
        agreement = RankAgreement(StopRequest())
        counted = count_collectives()
        agreement.answer(lambda: 1)
        agreed = Counted(counted)
        counted.clear()
        features = Features(torch.randn(9, 6), torch.arange(9) % 3, tuple("abcdefghi"))
        find_neighbours(features.values, build_bank(features), k=4)
        return agreed, counted

    agreement = Talk("agreement", "step", "all_reduce", 1, 24, "")
    talks = ask_neighbours(k=4, width=6, ranks=ranks)
    for agreed, asked in on_ranks(ask, ranks=ranks):
        assert {key[1:]: count for key, count in agreed.items()} == dict(total([agreement], "step"))
        assert {key[1:]: count for key, count in asked.items()} == dict(total(talks, talks[0].when))


def test_rounds_of_questions_are_the_evaluators() -> None:
    for ranks in (1, 8, 9, 64, 1024, 10_000):
        assert count_questions(ranks) == evaluator.count_questions(ranks)


def test_many_ranks_agree_in_as_many_rounds_as_are_said() -> None:
    """Of 24 bytes each; tests/core/test_fake_ranks.py counts the rounds."""
    assert messages.RING_RANKS == collectives.RING_RANKS
    for ranks, rounds in ((65, 7), (128, 7), (129, 8), (1024, 10)):
        assert count_sent(Talk("agreement", "step", "rounds", 1, 24, ""), ranks=ranks) == 24 * rounds


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_grows_faster_than_ranks(tiny_run: Callable[..., Any], stage: int, device: str) -> None:  # noqa: F811
    """From 8 ranks to 1,024, each with a micro-batch of its own, none sends more than 128 times as much."""

    def count(ranks: int) -> dict[str, int]:
        knn = {"every": "1ep", "k": 20}
        run = tiny_run(
            ranks=ranks,
            stage=stage,
            train_batch_size=2 * ranks,
            cmae={"monitor": {"knn": knn}},
            bf16={"enabled": True},
        )
        talks = list_talks(describe(run, ranks=ranks, device=device))
        return {talk.what: count_sent(talk, ranks=ranks) for talk in talks}

    few, many = count(8), count(1024)
    assert few.keys() == many.keys()
    for what, sent in many.items():
        # all but (ranks - 1) / ranks, which is 7/8 of a rank's share at 8 ranks
        assert sent <= few[what] * 128 * 8 / 7, what
    for what in many.keys() & {"answers", "questions", "gradients", "weights"}:
        assert many[what] <= few[what] * 1.2, what
    assert list_talks(describe(tiny_run(ranks=1), ranks=1)) == []
