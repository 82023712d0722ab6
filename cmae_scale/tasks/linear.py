"""The linear probe: heads on frozen features, one for each learning rate of a sweep."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.transfer import CropConfig, LinearConfig
from cmae_scale.data.plan import Purpose, draw_permutation
from cmae_scale.data.stream import CropBatch
from cmae_scale.layers.attention import set_attention_
from cmae_scale.models.classifier import LinearProbe, export_classifier, fold_probe
from cmae_scale.models.networks import build_network, count_training_flops
from cmae_scale.models.pretrained import PretrainedEncoder
from cmae_scale.tasks.encode import encode_with
from cmae_scale.tasks.evaluator import EvalResult, Evaluator, score
from cmae_scale.tasks.features import Features, Preprocessor, gather_features, predict_with
from cmae_scale.tasks.finetune import known_labels
from cmae_scale.tasks.task import Outcome


@dataclass(frozen=True)
class LinearProbing:
    """See task.Task. The gradients of the heads do not touch one another: each trains as if alone."""

    encoder: PretrainedEncoder
    cfg: LinearConfig
    crop: CropConfig
    classes: tuple[str, ...]
    preprocessor: Preprocessor
    seed: int
    model: LinearProbe
    seen: dict[str, Features] = field(default_factory=dict)  # validation features, where computed once

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The sum over heads, and each head's own where there are several."""
        return ("loss", *(f"loss_x{scale:g}" for scale in self.cfg.sweep)) if self._is_sweep else ("loss",)

    @property
    def _is_sweep(self) -> bool:
        return len(self.cfg.sweep) > 1

    @property
    def image_flops(self) -> int:
        """A forward pass of the encoder."""
        return count_training_flops(self.encoder, self.model.encoder, trained_blocks=0)

    def groups(self, *, weight_decay: float) -> list[dict[str, Any]]:
        """Weights and biases of each head; LARS adapts the weights' step only. Source: MAE util/lars.py."""
        groups = []
        for head, scale in zip(self.model.heads, self.cfg.sweep, strict=True):
            for parameter in head.parameters():
                is_weight = parameter.ndim > 1
                decay = weight_decay if is_weight else 0.0
                groups.append(
                    {
                        "params": [parameter],
                        "lr_scale": scale,
                        "weight_decay": decay,
                        "always_adapt": is_weight,
                    }
                )
        return groups

    def prepare(self, part: CropBatch, *, step: int, first_row: int, total: int) -> tuple[Tensor, Tensor]:
        """Images, or the features that stand for them, and labels."""
        labels = known_labels(part).to(self.preprocessor.device, non_blocking=True)
        if self.cfg.features == "once":
            return part.images[:, 0].to(self.preprocessor.device, non_blocking=True), labels
        return self.preprocessor.preprocess(part.images[:, 0]), labels

    def losses(self, output: Tensor, target: Tensor) -> Float[Tensor, " metrics"]:
        """Cross-entropy: summed over heads, then of each."""
        rows = output.float().flatten(0, 1)
        each = F.cross_entropy(rows, target.repeat_interleave(output.shape[1]), reduction="none")
        heads = each.view(len(output), -1).mean(dim=0)
        return torch.cat([heads.sum()[None], heads]) if self._is_sweep else heads

    def evaluate(self, state: Mapping[str, Tensor], *, evaluator: Evaluator) -> Outcome:
        """Scores of the best head, and of each by its multiple of the learning rate."""
        probe = self._build()
        probe.load_state_dict(dict(state))
        if self.cfg.features == "once":
            features = self._extract_once(evaluator)
            probe.eval().to(self.preprocessor.device)
            with torch.no_grad():
                logits = probe(features.values)
            seen = Features(logits, features.labels, features.keys)
        else:
            seen = evaluator.extract(predict_with(probe, self.preprocessor), evaluator.labelled.val)
        scores = [score(logits, seen.labels) for logits in seen.values.unbind(1)]
        best = max(range(len(scores)), key=lambda head: scores[head].top1)
        found = scores[best].as_metrics("val", self.classes)
        if self._is_sweep:
            found["val_lr_scale"] = self.cfg.sweep[best]
            found["val_top1_by_lr_scale"] = {
                f"{scale:g}": round(one.top1, 6) for scale, one in zip(self.cfg.sweep, scores, strict=True)
            }
        return Outcome(EvalResult(scores[best], seen, seen.values[:, best].softmax(dim=1)), found, head=best)

    def export(self, state: Mapping[str, Tensor], folder: Path, *, head: int) -> None:
        """Write encoder and head as a plain timm classifier: the batch norm is folded into the head."""
        export_classifier(
            fold_probe(state, head=head),
            folder,
            encoder=self.encoder,
            pool=self.cfg.pool,
            has_new_norm=False,
            classes=self.classes,
            crop=self.crop,
            mean=self.preprocessor.mean,
            std=self.preprocessor.std,
        )

    def _build(self) -> LinearProbe:
        return _build_probe(self.encoder, self.cfg, crop=self.crop, classes=len(self.classes), seed=self.seed)

    def _extract_once(self, evaluator: Evaluator) -> Features:
        if "val" not in self.seen:
            encode = encode_with(self.encoder, self.preprocessor, img_px=self.crop.img_px, pool=self.cfg.pool)
            self.seen["val"] = evaluator.extract(encode, evaluator.labelled.val)
        return self.seen["val"]

    def open_features(
        self, evaluator: Evaluator, *, fraction: float, batch: int, accumulation: int, steps: range
    ) -> Iterator[CropBatch]:
        """This rank's micro-batches of features that are computed here, once, from centred images."""
        encode = encode_with(self.encoder, self.preprocessor, img_px=self.crop.img_px, pool=self.cfg.pool)
        bank = gather_features(evaluator.extract(encode, evaluator.labelled.train, fraction=fraction))
        known = (bank.labels >= 0).nonzero()[:, 0].tolist()
        return _deal_features(
            bank,
            known,
            seed=self.seed,
            rank=evaluator.world.rank,
            ranks=evaluator.world.size,
            batch=batch,
            accumulation=accumulation,
            steps=steps,
        )


def build_probing(
    encoder: PretrainedEncoder,
    cfg: LinearConfig,
    *,
    crop: CropConfig,
    classes: tuple[str, ...],
    preprocessor: Preprocessor,
    seed: int,
) -> LinearProbing:
    """The task with fresh heads."""
    probe = _build_probe(encoder, cfg, crop=crop, classes=len(classes), seed=seed)
    set_attention_(probe, preprocessor.attention)
    return LinearProbing(encoder, cfg, crop, classes, preprocessor, seed, probe)


def _build_probe(
    encoder: PretrainedEncoder, cfg: LinearConfig, *, crop: CropConfig, classes: int, seed: int
) -> LinearProbe:
    frozen = build_network(encoder, img_px=crop.img_px, pool=cfg.pool)
    return LinearProbe(frozen, classes=classes, heads=len(cfg.sweep), seed=seed)


def _deal_features(
    bank: Features,
    known: list[int],
    *,
    seed: int,
    rank: int,
    ranks: int,
    batch: int,
    accumulation: int,
    steps: range,
) -> Iterator[CropBatch]:
    """Micro-batches in an order that is drawn per epoch; which rows a rank gets follows from the step."""
    per_epoch = len(known) // batch
    micro = batch // (ranks * accumulation)
    numbers = torch.tensor(known)
    order, of_epoch = numbers, -1
    for step in steps:
        epoch, within = divmod(step, per_epoch)
        if epoch != of_epoch:
            drawn = draw_permutation(seed, Purpose.FEATURE_ORDER, slot=(epoch, 0, 0), count=len(known))
            order, of_epoch = numbers[torch.from_numpy(drawn)], epoch
        for part in range(accumulation):
            first = within * batch + (rank * accumulation + part) * micro
            rows = order[first : first + micro]
            on_device = rows.to(bank.values.device)
            yield CropBatch(
                bank.values[on_device, None],  # features in the place of images
                bank.labels[on_device].cpu(),
                tuple(bank.keys[row] for row in rows.tolist()),
                step,
                part,
            )
