"""Exact scores on labelled shards, of a classifier or of nearest neighbours, over all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from cmae_scale.config.cmae import DataConfig, KnnConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.collectives import exchange_rows, gather_objects, gather_rows, sum_of_ranks, world_size
from cmae_scale.core.errors import DataError
from cmae_scale.core.world import World
from cmae_scale.data.decoding import BadSamples, CentreCrops
from cmae_scale.data.ordered import count_samples, open_ordered
from cmae_scale.data.shard_set import Labelled, ShardSet
from cmae_scale.data.stream import copy_ahead
from cmae_scale.tasks.features import Features, Predict, extract_features

CHUNK = 1024  # questions of a rank at a time, and
AT_ONCE = 8 * CHUNK  # of all ranks together, so that neither memory nor padding grows with ranks
BLOCK = 2**16  # voters at a time: AT_ONCE x BLOCK similarities exist at once


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


def vote(features: Features, bank: Bank, *, cfg: KnnConfig, classes: int) -> Float[Tensor, "images classes"]:
    """Votes for each class by the k nearest of all ranks' voters. All ranks call it together.

    Source: Wu et al. (arXiv:1805.01978) section 3.4: a neighbour weighs exp(cosine / temperature).
    """
    near = find_neighbours(features.values, bank, k=cfg.k)
    votes = near.similarity.new_zeros(len(near.similarity), classes)
    return votes.scatter_add_(1, near.label, (near.similarity / cfg.temperature).exp())


def find_neighbours(
    values: Float[Tensor, "images dim"], bank: Bank, *, k: int, chunk: int | None = None
) -> Neighbours:
    """The `k` nearest voters on any rank for each of this rank's images. All ranks call it together.

    `chunk` of each rank's images at a time are asked of every rank, and only the rank that asked is answered.
    Ranks may have different numbers of images, or none.
    """
    k, chunk = min(k, bank.total), chunk or count_questions(world_size())
    sizes = gather_objects((len(values), max(values.shape[1], bank.values.shape[1])))
    longest, dim = max(size for size, _ in sizes), max(width for _, width in sizes)
    found = []
    for start in range(0, longest, chunk):
        own = values.new_zeros(chunk, dim, dtype=torch.float32)
        part = values[start : start + chunk]
        if len(part):
            own[: len(part)] = F.normalize(part.float(), dim=1)
        near = _merge_ranks(search(gather_rows(own), bank, k=k), chunk=chunk, k=k)
        found.append(Neighbours(near.similarity[: len(part)], near.label[: len(part)]))
    return Neighbours(
        torch.cat([near.similarity for near in found]), torch.cat([near.label for near in found])
    )


def count_questions(ranks: int) -> int:
    """Questions that each rank asks in one round, every rank as many."""
    return max(1, min(CHUNK, AT_ONCE // ranks))


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


def _merge_ranks(near: Neighbours, *, chunk: int, k: int) -> Neighbours:
    """From this rank's answers to all questions, the best answers of all ranks to its own questions."""

    def own(answers: Tensor) -> Tensor:
        return exchange_rows(answers).view(-1, chunk, k).transpose(0, 1).reshape(chunk, -1)

    return _keep_best(own(near.similarity), own(near.label), k=k)


def _keep_best(similarity: Tensor, label: Tensor, *, k: int) -> Neighbours:
    best = similarity.topk(k, dim=1)
    return Neighbours(best.values, label.gather(1, best.indices))


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


@dataclass(frozen=True)
class Evaluator:
    """Looks at centred images of `shards`, every one exactly once over all ranks."""

    labelled: Labelled
    data: DataConfig
    crop: CropConfig
    batch: int
    world: World
    device: torch.device

    def extract(self, predict: Predict, shards: ShardSet, *, fraction: float = 1.0) -> Features:
        """What `predict` gives for this rank's share of `shards`."""
        if sum(count_samples(shards, fraction)) < self.world.size:
            raise DataError(f"{shards.describe()} holds fewer images than there are ranks: start fewer")
        bad = BadSamples(self.data.max_bad_fraction, consequence="left out")
        stream = open_ordered(
            shards,
            decoding=CentreCrops(self.crop, self.data.max_image_mpx),
            data=self.data,
            batch=self.batch,
            bad=bad,
            rank=self.world.rank,
            ranks=self.world.size,
            fraction=fraction,
            pin=self.device.type == "cuda",
        )
        with stream:
            features = extract_features(predict, copy_ahead(stream, self.device), device=self.device)
        counts = gather_objects((bad.count, len(features.keys)))
        bad.check(sum(count for count, _ in counts), seen=sum(seen for _, seen in counts))
        return features

    def evaluate_knn(self, encode: Predict, *, cfg: KnnConfig, fraction: float = 1.0) -> "EvalResult":
        """Nearest neighbours: the training shards vote on the validation shards."""
        bank = build_bank(self.extract(encode, self.labelled.train, fraction=fraction))
        features = self.extract(encode, self.labelled.val)
        votes = vote(features, bank, cfg=cfg, classes=len(self.labelled.classes))
        return EvalResult(score(votes, features.labels), features, votes / votes.sum(dim=1, keepdim=True))

    def evaluate_classifier(self, predict: Predict) -> "EvalResult":
        """A network with a head."""
        logits = self.extract(predict, self.labelled.val)
        return EvalResult(score(logits.values, logits.labels), logits, logits.values.softmax(dim=1))


@dataclass(frozen=True)
class EvalResult:
    """Scores over all ranks; `features` and `probabilities` are of this rank's validation images."""

    scores: Scores
    features: Features
    probabilities: Float[Tensor, "images classes"]
