"""A network's exact scores on labelled shards."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.cmae import DataConfig, KnnConfig
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import DataError
from cmae_scale.core.world import World
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.decoding import CentreCrops
from cmae_scale.data.labelled import Labelled
from cmae_scale.data.ordered import count_samples, open_ordered
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.stream import copy_ahead
from cmae_scale.tasks.features import Features, Predict, extract_features
from cmae_scale.tasks.knn import build_bank, vote
from cmae_scale.tasks.scores import Scores, score


@dataclass(frozen=True)
class Evaluator:
    """Looks at centred images of `shards`, every one exactly once over all ranks."""

    labelled: Labelled
    data: DataConfig
    crop: CropConfig
    batch: int
    world: World
    device: torch.device

    def look(self, predict: Predict, shards: ShardSet, *, fraction: float = 1.0) -> Features:
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

    def judge_knn(self, encode: Predict, *, cfg: KnnConfig, fraction: float = 1.0) -> "EvalResult":
        """Nearest neighbours: the training shards vote on the validation shards."""
        bank = build_bank(self.look(encode, self.labelled.train, fraction=fraction))
        features = self.look(encode, self.labelled.val)
        votes = vote(features, bank, cfg=cfg, classes=len(self.labelled.classes), rank=self.world.rank)
        return EvalResult(score(votes, features.labels), features, votes / votes.sum(dim=1, keepdim=True))

    def judge_classifier(self, predict: Predict) -> "EvalResult":
        """A network with a head."""
        logits = self.look(predict, self.labelled.val)
        return EvalResult(score(logits.values, logits.labels), logits, logits.values.softmax(dim=1))


@dataclass(frozen=True)
class EvalResult:
    """Scores over all ranks; `features` and `probabilities` are of this rank's validation images."""

    scores: Scores
    features: Features
    probabilities: Float[Tensor, "images classes"]
