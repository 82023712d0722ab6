"""Top-1, top-5 and per class, against scikit-learn, over ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cmae_scale.core.errors import DataError
from cmae_scale.tasks.evaluator import Scores, score


def draw(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(200, 12, generator=rng), torch.randint(-1, 12, (200,), generator=rng)


def test_scores_are_scikit_learns(rng: torch.Generator) -> None:
    from sklearn.metrics import confusion_matrix, top_k_accuracy_score

    votes, labels = draw(rng)
    scores, known = score(votes, labels), labels >= 0
    true, guess = labels[known].numpy(), votes[known].numpy()
    names = [str(number) for number in range(12)]
    assert scores.images == int(known.sum()) < 200
    assert scores.top1 == pytest.approx(top_k_accuracy_score(true, guess, k=1, labels=range(12)))
    assert scores.top5 == pytest.approx(top_k_accuracy_score(true, guess, k=5, labels=range(12)))
    matrix = confusion_matrix(true, guess.argmax(1), labels=range(12))
    assert (scores.confusion.numpy() == matrix).all()
    recalls = matrix.diagonal() / matrix.sum(1)
    assert scores.per_class(names) == pytest.approx(dict(zip(names, recalls, strict=True)))


@pytest.mark.dist
def test_ranks_with_unequal_shares_agree_on_the_exact_counts(
    on_ranks: Callable[..., list[Any]], rng: torch.Generator
) -> None:
    votes, labels = draw(rng)

    def run() -> Scores:
        from cmae_scale.engine.process.group import start_processes

        rows = slice(0, 3) if start_processes().world.rank == 0 else slice(3, None)
        return score(votes[rows], labels[rows])

    whole = score(votes, labels)
    for scores in on_ranks(run, ranks=2):
        assert torch.equal(scores.confusion, whole.confusion)
        assert scores.in_top5 == whole.in_top5


def test_no_label_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="has a label"):
        score(torch.zeros(3, 2), torch.full((3,), -1))
