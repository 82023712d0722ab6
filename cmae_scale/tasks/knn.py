"""Weighted nearest neighbours: the labelled images that look alike to the encoder vote.

The voters stay where they were computed, each rank with its share; questions go round, answers come back. So
ImageNet's 1.28 million features need no GPU that holds them all, and no matrix of all pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cmae_scale.config.cmae import KnnConfig
from cmae_scale.core.collectives import gather_objects, gather_rows, world_size
from cmae_scale.core.errors import DataError
from cmae_scale.tasks.features import Features

CHUNK = 1024  # questions of a rank at a time
BLOCK = 2**16  # voters at a time: CHUNK x ranks x BLOCK similarities exist at once


class Neighbours(NamedTuple):
    """The nearest voters of each question, best first; similarity is the cosine."""

    similarity: Float[Tensor, "images k"]
    label: Int64[Tensor, "images k"]


@dataclass(frozen=True)
class Bank:
    """This rank's voters, each of length 1 and with a label."""

    values: Float[Tensor, "voters dim"]
    labels: Int64[Tensor, " voters"]
    total: int  # of all ranks


def build_bank(features: Features) -> Bank:
    """The labelled ones of `features`. DataError when no rank has any; all ranks call it together."""
    known = features.labels >= 0
    total = sum(gather_objects(int(known.sum())))
    if not total:
        raise DataError("no image of the training shards has a label: make them from a folder of classes")
    return Bank(F.normalize(features.values[known].float(), dim=1), features.labels[known], total)


def vote(
    features: Features, bank: Bank, *, cfg: KnnConfig, classes: int, rank: int
) -> Float[Tensor, "images classes"]:
    """Votes for each class by the k nearest of all ranks' voters. All ranks call it together.

    Source: Wu et al. (arXiv:1805.01978) section 3.4: a neighbour weighs exp(cosine / temperature).
    """
    near = find_neighbours(features.values, bank, k=cfg.k, rank=rank)
    votes = near.similarity.new_zeros(len(near.similarity), classes)
    return votes.scatter_add_(1, near.label, (near.similarity / cfg.temperature).exp())


def find_neighbours(
    values: Float[Tensor, "images dim"], bank: Bank, *, k: int, rank: int, chunk: int = CHUNK
) -> Neighbours:
    """The `k` nearest voters on any rank for each of this rank's images. All ranks call it together."""
    k = min(k, bank.total)
    sizes = gather_objects((len(values), max(values.shape[1], bank.values.shape[1])))
    longest, dim = max(size for size, _ in sizes), max(width for _, width in sizes)
    found = []
    for start in range(0, longest, chunk):
        own = values.new_zeros(chunk, dim, dtype=torch.float32)
        part = values[start : start + chunk]
        if len(part):
            own[: len(part)] = F.normalize(part.float(), dim=1)
        near = _merge_ranks(search(gather_rows(own), bank, k=k), rank=rank, chunk=chunk, k=k)
        found.append(Neighbours(near.similarity[: len(part)], near.label[: len(part)]))
    return Neighbours(
        torch.cat([near.similarity for near in found]), torch.cat([near.label for near in found])
    )


def search(questions: Float[Tensor, "images dim"], bank: Bank, *, k: int, block: int = BLOCK) -> Neighbours:
    """The `k` nearest of this rank's own voters; where it has fewer, the rest is infinitely unlike."""
    best = Neighbours(
        questions.new_full((len(questions), k), -torch.inf),
        torch.zeros(len(questions), k, dtype=torch.int64, device=questions.device),
    )
    for start in range(0, len(bank.values), block):
        similarity = questions @ bank.values[start : start + block].T
        labels = bank.labels[start : start + block].expand(len(questions), -1)
        nearest = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best = _keep_best(
            torch.cat([best.similarity, nearest.values], dim=1),
            torch.cat([best.label, labels.gather(1, nearest.indices)], dim=1),
            k=k,
        )
    return best


def _merge_ranks(near: Neighbours, *, rank: int, chunk: int, k: int) -> Neighbours:
    """From each rank's answers to all questions, the best answers of all ranks to this rank's own."""
    ranks = world_size()

    def own(answers: Tensor) -> Tensor:
        mine = gather_rows(answers).view(ranks, ranks, chunk, k)[:, rank]
        return mine.transpose(0, 1).reshape(chunk, ranks * k)

    return _keep_best(own(near.similarity), own(near.label), k=k)


def _keep_best(similarity: Tensor, label: Tensor, *, k: int) -> Neighbours:
    best = similarity.topk(k, dim=1)
    return Neighbours(best.values, label.gather(1, best.indices))
