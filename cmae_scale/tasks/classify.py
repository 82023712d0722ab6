"""An exported classifier, used on single images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from cmae_scale.augment.views import normalise
from cmae_scale.config.transfer import CropConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.decoding import CentreCrops, SampleSlot
from cmae_scale.data.image_formats import IMAGE_ENDINGS
from cmae_scale.models.read import read_classifier, read_description
from cmae_scale.models.weights import CONFIG_FILE

MAX_MPX = 100.0


@dataclass(frozen=True)
class Classifier:
    """A network with names for its classes, and how images are prepared for it."""

    model: nn.Module
    names: tuple[str, ...]
    crop: CropConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_images(places: Sequence[str], *, listed: Iterable[bytes]) -> Iterator[Path]:
    """The images that `places` name; "-" stands for the lines of `listed`.

    Of a folder all that are called like images, at any depth, in order; the folder itself if there are none.
    """
    for place in places:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in listed)
        for path in map(Path, (line for line in lines if line) if place == "-" else [place]):
            if not path.is_dir():
                yield path
                continue
            below = (each for each in path.rglob("*") if each.suffix.lower().lstrip(".") in IMAGE_ENDINGS)
            images = sorted(each for each in below if each.is_file() and not _is_hidden(each, path))
            yield from images or [path]


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether it, or a folder on the way from `folder`, is what systems keep for themselves."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)


def classify_file(classifier: Classifier, path: Path, *, count: int) -> list[tuple[str, float]]:
    """`guess` for an image file. DataError if it cannot be read or is none."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise DataError(f"the folder holds no image ({', '.join(sorted(IMAGE_ENDINGS))})") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        raise DataError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return guess(classifier, data, count=count)


def open_classifier(folder: str) -> Classifier:
    """The model of a folder such as RUN/model, or of RUN. ConfigError when there is none with a head."""
    exported = Path(folder) / "model"
    folder = str(exported) if (exported / CONFIG_FILE).is_file() else folder
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
    side = classifier.crop.img_px
    pixels = np.empty((1, side, side, 3), dtype=np.uint8)
    CentreCrops(classifier.crop, MAX_MPX).decode(data, SampleSlot(0, 0, 0), out=pixels)
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), mean=classifier.mean, std=classifier.std)
    shares = classifier.model(images).softmax(dim=1)[0]
    best = shares.topk(min(count, len(shares)))
    return [
        (classifier.names[place], share)
        for share, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
