"""Pooled features of images by a frozen encoder, in the order in which the images come."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from cmae_scale.augment.views import normalise
from cmae_scale.core.collectives import gather_objects, gather_rows
from cmae_scale.data.stream import CropBatch
from cmae_scale.layers.attention import TORCHS_PICK, AttentionChoice, set_attention_, use_attention

Predict = Callable[[UInt8[Tensor, "batch 3 side side"]], Float[Tensor, "batch dim"]]


@dataclass(frozen=True)
class Features:
    """One row per image of this rank, on the device. `labels` are -1 for images that count for nothing."""

    values: Float[Tensor, "images dim"]
    labels: Int64[Tensor, " images"]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Preprocessor:
    """How images become what a network sees, and in which number format it computes."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    compute: torch.dtype = torch.float32
    attention: AttentionChoice = TORCHS_PICK

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in `compute`."""
        enabled = self.compute is not torch.float32
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=self.compute if enabled else None, enabled=enabled
        )
        return context

    def preprocess(self, images: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
        """Normalised images on the device."""
        return normalise(images.to(self.device, non_blocking=True), mean=self.mean, std=self.std)


def predict_with(model: nn.Module, preprocessor: Preprocessor) -> Predict:
    """`model` as a function from bytes to fp32 outputs, in evaluation mode and without gradient."""
    model = model.to(preprocessor.device).eval()
    set_attention_(model, preprocessor.attention)

    @torch.no_grad()
    def predict(images: UInt8[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch dim"]:
        with preprocessor.autocast(), use_attention(preprocessor.attention):
            output: Tensor = model(preprocessor.preprocess(images))
        return output.float()

    return predict


def extract_features(predict: Predict, batches: Iterable[CropBatch], *, device: torch.device) -> Features:
    """What `predict` makes of every image of this rank."""
    values, labels = [], []
    keys: list[str] = []
    for batch in batches:
        values.append(predict(batch.images[:, 0]))
        labels.append(batch.labels.to(device, non_blocking=True))
        keys += batch.keys
    if not values:  # fewer images than ranks
        return Features(
            torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device), ()
        )
    return Features(torch.cat(values), torch.cat(labels), tuple(keys))


def gather_features(features: Features) -> Features:
    """The features of all ranks, in rank order, on all ranks."""
    counts = gather_objects((len(features.keys), features.values.shape[1]))
    longest, dim = max(count for count, _ in counts), max(width for _, width in counts)
    values = features.values.new_zeros(longest, dim)
    labels = features.labels.new_full((longest, 1), -1)
    values[: len(features.keys)], labels[: len(features.keys), 0] = features.values, features.labels
    rows = torch.cat([torch.arange(count) + rank * longest for rank, (count, _) in enumerate(counts)])
    rows = rows.to(values.device)
    keys = [key for part in gather_objects(features.keys) for key in part]
    return Features(gather_rows(values)[rows], gather_rows(labels)[rows, 0], tuple(keys))
