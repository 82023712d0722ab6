"""scikit-learn's handwritten digits, which are always there."""

import functools
from io import BytesIO

import numpy as np
from PIL import Image

from cmae_scale.core.errors import ConfigError
from data_prep.listing import Item, Listing
from data_prep.sources.source import Source, SourceRequest

SIDE_PX = 32  # of the enlarged 8x8 originals
HELD_OUT = 0.2


def list_digits(request: SourceRequest) -> dict[str, Source]:
    """1,797 images that need no download. A fifth of each class becomes val."""
    if request.root is not None:
        raise ConfigError("--source digits comes with scikit-learn: leave out --root")
    labels = _load()[1]
    order = [np.flatnonzero(labels == digit) for digit in range(10)]
    held_out = {int(row) for rows in order for row in rows[: round(len(rows) * HELD_OUT)]}
    classes = tuple(str(digit) for digit in range(10))
    splits = {"train": set(range(len(labels))) - held_out, "val": held_out}
    return {
        split: Source(
            f"digits {split}",
            Listing(Item(f"digit {row}", int(labels[row]), (row, 0, 0)) for row in sorted(rows)),
            classes,
            _read,
        )
        for split, rows in splits.items()
    }


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # a second of import that other sources need not pay

    bunch = load_digits()
    return bunch.images, bunch.target


def _read(item: Item) -> bytes:
    pixels = _load()[0][item.place[0]]  # 0..16
    grey = np.minimum(pixels * 16, 255).astype(np.uint8)
    image = Image.fromarray(grey).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
