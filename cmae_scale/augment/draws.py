"""Every random number of the views of one global batch, drawn before any rank takes its share."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cmae_scale.config.cmae import ViewsConfig


def step_generator(seed: int, *, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("views", "mask") of one step: equal on all ranks and restarts."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # what the entries of `ViewNumbers.order` mean

_COLUMNS = 15  # uniform numbers per image, used or not, so that no setting moves the numbers of another


@dataclass(frozen=True)
class ViewNumbers:
    """What happens to each image, one row each. On the CPU, where reading them waits for no device.

    `flip` is of the master image and so of both views; everything else is of the target view only.
    """

    flip: Bool[Tensor, " total"]
    shift_x: Int[Tensor, " total"]  # px, 0 .. shift_px - 1
    shift_y: Int[Tensor, " total"]
    jitter: Bool[Tensor, " total"]  # whether the four factors below are used
    brightness: Float[Tensor, " total"]  # 1 = unchanged
    contrast: Float[Tensor, " total"]
    saturation: Float[Tensor, " total"]
    hue: Float[Tensor, " total"]  # turns of the colour circle, 0 = unchanged
    order: Int[Tensor, "total 4"]  # a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE: first to last
    gray: Bool[Tensor, " total"]
    blur: Bool[Tensor, " total"]
    sigma: Float[Tensor, " total"]  # px, used where `blur`

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, first: int, count: int) -> "ViewNumbers":
        """The numbers of images `first` .. `first + count - 1`."""
        assert 0 <= first <= len(self) - count, f"rows {first}+{count} of {len(self)}"
        return self.pick(slice(first, first + count))

    def pick(self, rows: "slice | Int[Tensor, ' some']") -> "ViewNumbers":
        """The numbers of these images, in this order."""
        return ViewNumbers(**{name: column[rows] for name, column in vars(self).items()})


def draw_views(total: int, *, views: ViewsConfig, rng: torch.Generator) -> ViewNumbers:
    """The numbers of `total` images, all from `rng` (a CPU generator).

    Drawn for the whole global batch and then cut with `rows`, so a step's views are the same however many
    ranks share it. Each image takes the same count of numbers from `rng` whatever the settings: switching
    colour off leaves flips and shifts as they were.

    Source: paper 3.2 and 4.4 (shift 0..31, both axes on their own); official datasets/cmae_dataset.py
    (colour on the target only: jitter in random order, then grey, then blur).
    Differs: the official blur is Pillow's box approximation with radius = sigma; here it is a true Gaussian.
    """
    uniform = torch.rand(
        total, _COLUMNS, generator=rng, dtype=torch.float64
    )  # 53 bits: floor(u * n) < n always
    flip, shift_x, shift_y, jitter, gray, blur, sigma = uniform[:, :7].unbind(1)
    factors, order = uniform[:, 7:11], uniform[:, 11:].argsort(1)
    ops = views.color_ops
    steps = views.shift_px if views.target_crop == "shift" else 0
    spread = torch.tensor([ops.brightness, ops.contrast, ops.saturation, ops.hue], dtype=torch.float64)
    middle = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    factors = (middle + spread * (2 * factors - 1)).float()
    low, high = ops.blur_sigma
    return ViewNumbers(
        flip=flip < views.flip_p,
        shift_x=(shift_x * steps).long(),
        shift_y=(shift_y * steps).long(),
        jitter=(jitter < ops.jitter_p) & views.color,
        brightness=factors[:, BRIGHTNESS],
        contrast=factors[:, CONTRAST],
        saturation=factors[:, SATURATION],
        hue=factors[:, HUE],
        order=order,
        gray=(gray < ops.gray_p) & views.color,
        blur=(blur < ops.blur_p) & views.color,
        sigma=(low + (high - low) * sigma).float(),
    )
