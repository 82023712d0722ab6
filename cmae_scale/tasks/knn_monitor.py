"""Nearest neighbours while pre-training goes on: what the encoder has learned so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.cmae import CmaeConfig, KnnMonitorConfig, Pool
from cmae_scale.config.schedules import Clock, read_steps
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.collectives import find_together
from cmae_scale.core.world import World
from cmae_scale.data.shard_set import Labelled, find_monitored, open_labelled
from cmae_scale.layers.attention import AttentionChoice
from cmae_scale.models.build import build_encoder
from cmae_scale.models.encoder import ImageEncoder
from cmae_scale.tasks.evaluator import Evaluator
from cmae_scale.tasks.features import Preprocessor, predict_with

Weights = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class KnnMonitor:
    """An evaluation of the training loop. Works on a copy of the weights, so training notices nothing."""

    cfg: KnnMonitorConfig
    run: CmaeConfig
    evaluator: Evaluator
    gather: Weights  # the online encoder's, on all ranks
    compute: torch.dtype
    attention: AttentionChoice
    every_steps: int
    total_steps: int

    def is_due(self, done: int) -> bool:
        """After every so many steps, and at the end."""
        return done % self.every_steps == 0 or done == self.total_steps

    def evaluate(self, done: int) -> dict[str, Any]:
        """Scores by name. All ranks call it together."""
        views = self.run.views
        preprocessor = Preprocessor(
            views.mean, views.std, self.evaluator.device, self.compute, self.attention
        )
        encoder = build_encoder(self.run.model, img_px=views.img_px)
        encoder.load_state_dict(self.gather())
        encode = predict_with(_Pooled(encoder, self.cfg.pool), preprocessor)
        result = self.evaluator.evaluate_knn(encode, cfg=self.cfg, fraction=self.cfg.train_fraction)
        return result.scores.as_metrics("knn", self.evaluator.labelled.classes)


class _Pooled(nn.Module):
    """One vector per image: the mean of its patches' tokens, or the class token."""

    def __init__(self, encoder: ImageEncoder, pool: Pool) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch embed"]:
        """Features as nearest neighbours are asked for."""
        tokens: Tensor = self.encoder(images, None)
        return tokens[:, 0] if self.pool == "cls" else self.encoder.pool(tokens)


def open_knn_monitor(
    cfg: CmaeConfig,
    *,
    gather: Weights,
    world: World,
    device: torch.device,
    compute: torch.dtype,
    attention: AttentionChoice,
    clock: Clock,
) -> KnnMonitor | None:
    """The monitor that a run file asks for, if it does. Shards are opened, and found wanting, at once."""
    knn = cfg.monitor.knn
    if knn is None:
        return None
    train, val = find_monitored(cfg)
    views = cfg.views
    crop = CropConfig(img_px=views.img_px, centre=views.img_px / views.master_px)
    every = read_steps(knn.every, clock=clock, key="cmae.monitor.knn.every")
    labelled = find_together(
        lambda: open_labelled(train, val, data=cfg.data, measure=world.is_first_of_node),
        fingerprint=Labelled.fingerprint,
    )
    evaluator = Evaluator(labelled, cfg.data, crop, knn.batch, world, device)
    return KnnMonitor(knn, cfg, evaluator, gather, compute, attention, max(1, every), clock.total_steps)
