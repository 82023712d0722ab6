"""Nearest neighbours against scikit-learn's, over ranks and in pieces."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmae_scale.config.cmae import KnnConfig
from cmae_scale.core.errors import DataError
from cmae_scale.tasks.evaluator import Neighbours, build_bank, count_questions, find_neighbours, search, vote
from cmae_scale.tasks.features import Features

CLASSES, DIM = 5, 16


def draw(count: int, *, seed: int) -> Features:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    values = centres[labels] + 1.5 * torch.randn(count, DIM, generator=rng)
    return Features(values, labels, tuple(map(str, range(count))))


def part_of(features: Features, *, rank: int, ranks: int) -> Features:
    rows = slice(rank * len(features.keys) // ranks, (rank + 1) * len(features.keys) // ranks)
    return Features(features.values[rows], features.labels[rows], features.keys[rows])


def vote_alone(train: Features, val: Features, cfg: KnnConfig) -> torch.Tensor:
    return vote(val, build_bank(train), cfg=cfg, classes=CLASSES)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 1.0)])
def test_it_votes_as_scikit_learn_does(k: int, temperature: float) -> None:
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    train, val = draw(300, seed=1), draw(120, seed=2)
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.values.numpy(), train.labels.numpy())
    votes = vote_alone(train, val, KnnConfig(k=k, temperature=temperature))
    shares = votes / votes.sum(dim=1, keepdim=True)
    expected = torch.from_numpy(oracle.predict_proba(val.values.numpy())).float()
    torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_voters_and_change_no_vote(on_ranks: Callable[..., list[Any]], ranks: int) -> None:
    train, val, cfg = draw(101, seed=1), draw(50, seed=2), KnnConfig(k=20)

    def run() -> torch.Tensor:
        from cmae_scale.engine.process.group import start_processes

        rank = start_processes().world.rank
        bank = build_bank(part_of(train, rank=rank, ranks=ranks))
        return vote(part_of(val, rank=rank, ranks=ranks), bank, cfg=cfg, classes=CLASSES)

    together = torch.cat(on_ranks(run, ranks=ranks))
    torch.testing.assert_close(together, vote_alone(train, val, cfg), rtol=1e-5, atol=1e-2)


def find_plainly(
    train: Features, val: Features, *, parts: list[slice], chunk: int, k: int
) -> list[Neighbours]:
    """Each rank's neighbours, where every rank is sent every answer of every rank and keeps its own."""
    k, longest = min(k, len(train.keys)), max(len(val.values[rows]) for rows in parts)
    found: list[list[Neighbours]] = [[] for _ in parts]
    for start in range(0, longest, chunk):
        asked = torch.zeros(len(parts), chunk, DIM)
        for rank, rows in enumerate(parts):
            own = torch.nn.functional.normalize(val.values[rows][start : start + chunk], dim=1)
            asked[rank, : len(own)] = own
        banks = [build_bank(part_of(train, rank=rank, ranks=len(parts))) for rank in range(len(parts))]
        answers = [search(asked.view(-1, DIM), bank, k=k) for bank in banks]
        for rank, rows in enumerate(parts):
            mine = slice(rank * chunk, rank * chunk + len(val.values[rows][start : start + chunk]))
            similarity = torch.cat([answer.similarity[mine] for answer in answers], dim=1).topk(k, dim=1)
            label = torch.cat([answer.label[mine] for answer in answers], dim=1)
            found[rank].append(Neighbours(similarity.values, label.gather(1, similarity.indices)))
    return [
        Neighbours(torch.cat([a.similarity for a in one]), torch.cat([a.label for a in one])) for one in found
    ]


@pytest.mark.dist
@pytest.mark.parametrize(
    "questions", [[50], [20, 30], [0, 50], [17, 0, 3], [7, 8, 9, 10], [0, 0, 5, 0]], ids=str
)
def test_each_rank_is_sent_the_answers_to_its_own_questions_to_the_bit(
    on_ranks: Callable[..., list[Any]], questions: list[int]
) -> None:
    ranks, k, chunk = len(questions), 12, 7
    train, val = draw(40, seed=1), draw(sum(questions), seed=2)
    train.values[10:] = train.values[:30].clone()  # equally near voters, of other labels and on other ranks
    starts = [sum(questions[:rank]) for rank in range(ranks)]
    parts = [slice(start, start + count) for start, count in zip(starts, questions, strict=True)]

    def run() -> Neighbours:
        from cmae_scale.engine.process.group import start_processes

        rank = start_processes().world.rank
        bank = build_bank(part_of(train, rank=rank, ranks=ranks))
        values = val.values[parts[rank]]
        return find_neighbours(values if len(values) else torch.zeros(0, 0), bank, k=k, chunk=chunk)

    expected = find_plainly(train, val, parts=parts, chunk=chunk, k=k)
    for near, plain in zip(on_ranks(run, ranks=ranks), expected, strict=True):
        assert torch.equal(near.similarity, plain.similarity)
        assert torch.equal(near.label, plain.label)


def test_questions_of_all_ranks_at_once_do_not_grow_with_ranks() -> None:
    assert [count_questions(ranks) for ranks in (1, 8, 16, 1024, 100_000)] == [1024, 1024, 512, 8, 1]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_the_size_of_pieces_changes_nothing(block: int) -> None:
    train, val = draw(200, seed=1), draw(30, seed=2)
    bank = build_bank(train)
    questions = torch.nn.functional.normalize(val.values, dim=1)
    whole = (questions @ bank.values.T).topk(20, dim=1)
    near = search(questions, bank, k=20, block=block)
    torch.testing.assert_close(near.similarity, whole.values)
    assert torch.equal(near.label, bank.labels[whole.indices])
    in_chunks = find_neighbours(val.values, bank, k=20, chunk=7)
    torch.testing.assert_close(in_chunks.similarity, whole.values)


def test_voters_without_a_label_have_no_vote() -> None:
    train, val = draw(60, seed=1), draw(10, seed=2)
    train.labels[::2] = -1
    labelled = Features(train.values[1::2], train.labels[1::2], train.keys[1::2])
    cfg = KnnConfig(k=10)
    torch.testing.assert_close(vote_alone(train, val, cfg), vote_alone(labelled, val, cfg))
    train.labels[:] = -1
    with pytest.raises(DataError, match="no image of the training shards has a label"):
        build_bank(train)


def test_more_neighbours_than_voters_are_all_of_them() -> None:
    train, val = draw(8, seed=1), draw(4, seed=2)
    votes = vote_alone(train, val, KnnConfig(k=20, temperature=1.0))
    assert torch.equal((votes > 0).sum(dim=1), torch.full((4,), len(train.labels.unique())))
