"""Fine-tuning the encoder, or its last blocks, as a classifier."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.optim import param_groups_layer_decay
from torch import Tensor

from cmae_scale.augment.draws import step_generator
from cmae_scale.augment.erasing import ErasedBoxes, draw_boxes, erase_
from cmae_scale.augment.mixing import MixNumbers, draw_mixes, mix_images, mix_labels
from cmae_scale.config.transfer import CropConfig, FinetuneConfig
from cmae_scale.core.errors import DataError
from cmae_scale.data.stream import CropBatch
from cmae_scale.layers.attention import set_attention_
from cmae_scale.layers.drop_path import GivenDropPath, set_drop_paths_, take_over_drop_paths_
from cmae_scale.models.classifier import build_classifier, export_classifier
from cmae_scale.models.networks import Network, count_training_flops
from cmae_scale.models.pretrained import PretrainedEncoder
from cmae_scale.tasks.evaluator import Evaluator
from cmae_scale.tasks.features import Preprocessor, predict_with
from cmae_scale.tasks.task import Outcome


@dataclass(frozen=True)
class Finetuning:
    """See task.Task."""

    encoder: PretrainedEncoder
    cfg: FinetuneConfig
    crop: CropConfig
    classes: tuple[str, ...]
    preprocessor: Preprocessor
    seed: int
    model: Network
    drop_paths: list[GivenDropPath] = field(repr=False)
    metric_names: tuple[str, ...] = ("loss",)

    @property
    def image_flops(self) -> int:
        """Of a training step: what is frozen has a forward pass only."""
        return count_training_flops(self.encoder, self.model, trained_blocks=self.cfg.blocks)

    def groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each layer, with and without decay. Source: timm, MAE util/lr_decay.py."""
        groups: list[dict[str, Any]] = param_groups_layer_decay(
            self.model,
            weight_decay=weight_decay,
            no_weight_decay_list=self.model.no_weight_decay(),
            layer_decay=self.cfg.layer_decay,
        )
        return groups

    def prepare(self, part: CropBatch, *, step: int, first_row: int, total: int) -> tuple[Tensor, Tensor]:
        """Normalised, erased and mixed images with their mixed labels; drop paths are set on the way."""
        draws = self._draw(step, total)
        images = self.preprocessor.preprocess(part.images[:, 0])
        count = len(images)
        erase_(images, draws.boxes, first_row=first_row)
        mixes = draws.mixes.rows(first_row, count) if draws.mixes is not None else None
        if mixes is not None:
            images = mix_images(images, mixes)
        kept = draws.kept[first_row : first_row + count].to(images.device, non_blocking=True)
        set_drop_paths_(self.drop_paths, kept)
        labels = known_labels(part).to(images.device, non_blocking=True)
        target = mix_labels(labels, mixes, classes=len(self.classes), smoothing=self.cfg.smoothing)
        return images, target

    def losses(self, output: Tensor, target: Tensor) -> Float[Tensor, " metrics"]:
        """Cross-entropy with soft labels. Source: timm SoftTargetCrossEntropy."""
        return -(target * output.float().log_softmax(dim=1)).sum(dim=1).mean()[None]

    def evaluate(self, state: Mapping[str, Tensor], *, evaluator: Evaluator) -> Outcome:
        """Scores of the network with these weights."""
        model = build_classifier(
            self.encoder, self.cfg, img_px=self.crop.img_px, classes=len(self.classes), seed=self.seed
        )
        model.load_state_dict(dict(state))
        result = evaluator.evaluate_classifier(predict_with(model, self.preprocessor))
        return Outcome(result, result.scores.as_metrics("val", self.classes))

    def export(self, state: Mapping[str, Tensor], folder: Path, *, head: int) -> None:
        """Write it as a timm folder."""
        export_classifier(
            state,
            folder,
            encoder=self.encoder,
            pool=self.cfg.pool,
            has_new_norm=self.cfg.pool == "mean",
            classes=self.classes,
            crop=self.crop,
            mean=self.preprocessor.mean,
            std=self.preprocessor.std,
        )

    def _draw(self, step: int, total: int) -> "_StepDraws":
        return _draw_step(self.cfg, self.crop.img_px, self.seed, len(self.drop_paths), step=step, total=total)


@dataclass(frozen=True)
class _StepDraws:
    """All random numbers of a step's global batch."""

    boxes: ErasedBoxes
    mixes: MixNumbers | None
    kept: Float[Tensor, "total paths"]


@lru_cache(maxsize=2)  # micro-batches of a step ask for the same
def _draw_step(
    cfg: FinetuneConfig, img_px: int, seed: int, paths: int, *, step: int, total: int
) -> _StepDraws:
    def rng(purpose: str) -> torch.Generator:
        return step_generator(seed, step=step, purpose=purpose)

    return _StepDraws(
        draw_boxes(total, p=cfg.erase_p, area=cfg.erase_area, img_px=img_px, rng=rng("erase")),
        draw_mixes(total, cfg=cfg, img_px=img_px, rng=rng("mix")) if cfg.has_mixing else None,
        torch.rand(total, paths, generator=rng("drop path")),
    )


def build_finetuning(
    encoder: PretrainedEncoder,
    cfg: FinetuneConfig,
    *,
    crop: CropConfig,
    classes: tuple[str, ...],
    preprocessor: Preprocessor,
    seed: int,
    has_remat: bool,
) -> Finetuning:
    """The task with a fresh head."""
    model = build_classifier(encoder, cfg, img_px=crop.img_px, classes=len(classes), seed=seed)
    set_attention_(model, preprocessor.attention)
    model.set_grad_checkpointing(has_remat)
    return Finetuning(encoder, cfg, crop, classes, preprocessor, seed, model, take_over_drop_paths_(model))


def known_labels(part: CropBatch) -> Tensor:
    """The labels of a training batch. Raises DataError where one is missing."""
    if int(part.labels.min()) < 0:
        key = part.keys[int(part.labels.argmin())]
        raise DataError(f"{key} has no label: make the shards from a folder of classes")
    return part.labels
