"""Nearest neighbours while pre-training goes on: what the encoder has learned so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig, KnnMonitorConfig
from cmae_scale.config.durations import Clock, read_steps
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.world import World
from cmae_scale.data.labelled import open_labelled, place_monitored
from cmae_scale.layers.attention import AttentionChoice
from cmae_scale.models.pretrained import online_encoder
from cmae_scale.tasks.evaluator import Evaluator
from cmae_scale.tasks.features import build_preprocessor, encode_with

Weights = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class KnnMonitor:
    """An evaluation of the training loop. Works on a copy of the weights, so training notices nothing."""

    cfg: KnnMonitorConfig
    run: CmaeConfig
    judge: Evaluator
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
        encoder = online_encoder(self.gather(), model=self.run.model, views=self.run.views)
        lens = build_preprocessor(
            encoder,
            self.judge.crop,
            device=self.judge.device,
            compute=self.compute,
            attention=self.attention,
        )
        encode = encode_with(encoder, img_px=self.judge.crop.img_px, pool=self.cfg.pool, lens=lens)
        verdict = self.judge.judge_knn(encode, cfg=self.cfg, fraction=self.cfg.train_fraction)
        return verdict.scores.as_metrics("knn", self.judge.labelled.classes)


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
    train, val = place_monitored(cfg)
    views = cfg.views
    crop = CropConfig(img_px=views.img_px, centre=views.img_px / views.master_px)
    every = read_steps(knn.every, clock=clock, place="cmae.monitor.knn.every")
    labelled = open_labelled(train, val, data=cfg.data)
    judge = Evaluator(labelled, cfg.data, crop, knn.batch, world, device)
    return KnnMonitor(knn, cfg, judge, gather, compute, attention, max(1, every), clock.total_steps)
