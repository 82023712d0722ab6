"""How good predictions are: top-1, top-5, per class, exact over ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cmae_scale.core.collectives import sum_of_ranks
from cmae_scale.core.errors import DataError


@dataclass(frozen=True)
class Scores:
    """Counts of all ranks. `confusion[i, j]` images of class i were taken for class j."""

    confusion: Int64[Tensor, "classes classes"]
    in_top5: int

    @property
    def images(self) -> int:
        """Images with a label."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose first guess is right."""
        return int(self.confusion.trace()) / self.images

    @property
    def top5(self) -> float:
        """Share of images with the right class among five guesses (or all, if there are fewer classes)."""
        return self.in_top5 / self.images

    def per_class(self, names: Sequence[str]) -> dict[str, float]:
        """Top-1 of the images of each class that has any."""
        totals = self.confusion.sum(dim=1)
        return {
            name: int(self.confusion[i, i]) / int(totals[i]) for i, name in enumerate(names) if int(totals[i])
        }

    def as_metrics(self, prefix: str, names: Sequence[str]) -> dict[str, Any]:
        """For metrics.jsonl and the monitors."""
        return {
            f"{prefix}_top1": round(self.top1, 6),
            f"{prefix}_top5": round(self.top5, 6),
            f"{prefix}_images": self.images,
            f"{prefix}_per_class": {name: round(share, 4) for name, share in self.per_class(names).items()},
        }


def score(votes: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"]) -> Scores:
    """Scores over all ranks' images; those without a label (-1) count for nothing. All ranks call it.

    Raises DataError when no image has a label.
    """
    classes = votes.shape[1]
    known = labels >= 0
    votes, labels = votes[known], labels[known]
    predicted = votes.argmax(dim=1)
    pairs = torch.bincount(labels * classes + predicted, minlength=classes**2)
    best = votes.topk(min(5, classes), dim=1).indices
    hits = (best == labels[:, None]).any(dim=1).sum()
    counts = sum_of_ranks(torch.cat([pairs, hits[None]])).cpu()
    if not int(counts[:-1].sum()):
        raise DataError("no image of the validation shards has a label: make them from a folder of classes")
    return Scores(counts[:-1].view(classes, classes), int(counts[-1]))
