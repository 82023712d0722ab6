"""torchvision data sets that are arrays, not files: their images become PNG, which loses nothing."""

import functools
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item, Listing
from data_prep.sources.source import Source, SourceRequest

SPLITS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test", "unlabeled"),
    "svhn": ("train", "test"),
    "mnist": ("train", "test"),
    "fashion_mnist": ("train", "test"),
}


class Arrays(NamedTuple):
    """One split. A label of -1 is none; grey images have no last axis."""

    pixels: UInt8[np.ndarray, "images height width *channels"]
    labels: Int64[np.ndarray, " images"]
    classes: tuple[str, ...]


def list_arrays(name: str, request: SourceRequest) -> dict[str, Source]:
    """All splits of the torchvision data set `name`, downloaded into ROOT where they are not there yet."""
    if request.root is None:
        raise ConfigError(f"--source {name} needs --root, the folder for its download")
    return {split: _list_split(name, split, request.root) for split in SPLITS[name]}


def _list_split(name: str, split: str, root: Path) -> Source:
    try:
        arrays = _load(name, split, root, download=True)
    except (URLError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"--source {name} cannot be downloaded ({error}): put the files into {root} by hand"
        ) from None
    items = Listing(
        Item(f"{split} {row}", None if label < 0 else label, (row, 0, 0))
        for row, label in enumerate(arrays.labels.tolist())
    )
    return Source(f"{name} {split}", items, arrays.classes, functools.partial(_read, name, split, root))


def _read(name: str, split: str, root: Path, item: Item) -> bytes:
    file = BytesIO()
    Image.fromarray(_load_here(name, split, root).pixels[item.place[0]]).save(file, "PNG")
    return file.getvalue()


@functools.lru_cache(maxsize=1)  # the splits of a data set are written one after the other
def _load_here(name: str, split: str, root: Path) -> Arrays:
    return _load(name, split, root, download=False)


def _load(name: str, split: str, root: Path, *, download: bool) -> Arrays:
    from torchvision import datasets  # brings torch with it, which other sources need not wait for

    is_train = split == "train"
    match name:
        case "cifar10" | "cifar100":
            kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
            data = kind(root, train=is_train, download=download)
            return Arrays(data.data, np.asarray(data.targets), tuple(data.classes))
        case "stl10":
            data = datasets.STL10(root, split=split, download=download)
            return Arrays(data.data.transpose(0, 2, 3, 1), data.labels.astype(np.int64), tuple(data.classes))
        case "svhn":
            data = datasets.SVHN(root, split=split, download=download)
            digits = tuple(str(digit) for digit in range(10))
            return Arrays(data.data.transpose(0, 2, 3, 1), data.labels.astype(np.int64), digits)
        case _:
            kind = datasets.MNIST if name == "mnist" else datasets.FashionMNIST
            data = kind(root, train=is_train, download=download)
            return Arrays(data.data.numpy(), data.targets.numpy(), tuple(data.classes))
