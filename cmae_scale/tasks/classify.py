"""An exported classifier, used on single images."""

from dataclasses import dataclass

import timm
import torch
from torch import nn

from cmae_scale.augment.plain import normalise
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.transfer_settings import CropConfig
from cmae_scale.data.decoding import CentreCrops, SamplePlace
from cmae_scale.data.masters import empty_crops
from cmae_scale.models.read import read_classifier, read_description

MAX_MPX = 100.0


@dataclass(frozen=True)
class Classifier:
    """A network with names for its classes, and how images are prepared for it."""

    model: nn.Module
    names: tuple[str, ...]
    crop: CropConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_classifier(folder: str) -> Classifier:
    """The model of a folder such as RUN/model. ConfigError when there is none with a head."""
    return _open_hybrid(folder) or _open_timm(folder)


def _open_hybrid(folder: str) -> Classifier | None:
    """None for a model that timm opens."""
    try:
        about = read_description(folder)
    except ConfigError:
        return None
    if not about.model.is_hybrid:
        return None
    if not about.num_classes:
        raise _has_no_classes(folder)
    names = about.class_names or tuple(map(str, range(about.num_classes)))
    crop = CropConfig(img_px=about.img_px, centre=about.crop_pct)
    return Classifier(read_classifier(folder), names, crop, about.mean, about.std)


def _open_timm(folder: str) -> Classifier:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # timm raises many kinds for folders that are not its own
        raise ConfigError(
            f"no model at {folder} ({str(error).splitlines()[0]}): give the model/ folder of a transfer run"
        ) from None
    cfg, count = model.pretrained_cfg, int(model.num_classes)
    if not count:
        raise _has_no_classes(folder)
    names = tuple(cfg.get("label_names") or ()) or tuple(map(str, range(count)))
    crop = CropConfig(img_px=int(cfg["input_size"][-1]), centre=float(cfg["crop_pct"]))
    return Classifier(model, names, crop, tuple(cfg["mean"]), tuple(cfg["std"]))


def _has_no_classes(folder: str) -> ConfigError:
    return ConfigError(f"{folder} is an encoder without classes: fine-tune it with cmae_scale.transfer")


@torch.no_grad()
def guess(classifier: Classifier, data: bytes, *, count: int) -> list[tuple[str, float]]:
    """The `count` most probable classes of an encoded image, best first. DataError if it is none."""
    pixels = empty_crops(1, side=classifier.crop.img_px)
    CentreCrops(classifier.crop, MAX_MPX).decode(data, SamplePlace(0, 0, 0), out=pixels)
    images = normalise(pixels, mean=classifier.mean, std=classifier.std)
    shares = classifier.model(images).softmax(dim=1)[0]
    best = shares.topk(min(count, len(shares)))
    return [
        (classifier.names[place], share)
        for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
