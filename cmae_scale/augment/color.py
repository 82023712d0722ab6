"""Colour operations on batches of float RGB images in [0, 1], each image with its own numbers.

Each equals torchvision.transforms.functional's operation of the same name on one image, up to the rounding
of float32: the formulas are rearranged so that no pass over the pixels is wasted. What an operation needs
beside the images is made on the CPU by a function of its own, so that it all can travel to a device at once.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cmae_scale.augment.draws import CONTRAST, HUE, SATURATION

_LUMA = (0.2989, 0.587, 0.114)  # Source: ITU-R BT.601 as torchvision and Pillow round it


def grayscale(images: Float[Tensor, "batch 3 high wide"]) -> Float[Tensor, "batch 1 high wide"]:
    """Luma of each pixel."""
    red, green, blue = images.chunk(3, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


class JitterNumbers(NamedTuple):
    """What `jitter_` does to each image: made by `number_jitter`, used on the images' device."""

    steps: Float[Tensor, "batch 4 3 1 1 1"]  # see _blend_step_
    ends: tuple[int, ...]  # ends[p]: how many images have hue at a place before p
    hue: "HueNumbers | None"


def number_jitter(*, order: Int[Tensor, "batch 4"], factors: Float[Tensor, "batch 4"]) -> JitterNumbers:
    """Brightness, contrast, saturation and hue of each image in its own order, for `jitter_`.

    `factors` has a column per operation, `order` says which comes first to last; both on the CPU. The images
    must come sorted by the place of hue in their order (asserted): then every pass of `jitter_` works on a
    neighbouring range of images, nothing is gathered and no pass treats an image that does not need it.
    """
    hue_place = (order == HUE).int().argmax(1)
    assert bool((hue_place[1:] >= hue_place[:-1]).all()), "images must be sorted by the place of hue"
    ends = torch.searchsorted(hue_place, torch.arange(4), right=True).tolist()
    factor = factors.gather(1, order)
    steps = torch.stack([1 - factor, order == SATURATION, order == CONTRAST], dim=-1)
    return JitterNumbers(steps[..., None, None, None], (0, *ends), number_hue(factors[:, HUE]))


def jitter_(images: Float[Tensor, "batch 3 high wide"], numbers: JitterNumbers) -> None:
    """Brightness, contrast, saturation and hue of each image in its own order, in place.

    Source: official datasets/cmae_dataset.py through torchvision's ColorJitter (random order).
    """
    steps, ends, hue = numbers
    for place in (0, 1, 2):  # what comes before hue
        _blend_step_(images[ends[place + 1] :], steps[ends[place + 1] :, place])
    if hue is not None:
        turn_hue_(images, hue)
    for place in (1, 2, 3):  # what comes after it
        _blend_step_(images[: ends[place]], steps[: ends[place], place])


def _blend_step_(images: Float[Tensor, "batch 3 high wide"], step: Float[Tensor, "batch 3 1 1 1"]) -> None:
    """One of brightness, contrast and saturation per image, in place.

    All three blend the image with another one: black, its mean grey, its own grey picture. `step` holds the
    share of the other image and whether that is the grey picture or the mean; neither = black.
    """
    if not len(images):
        return
    share, use_gray, use_mean = step.unbind(1)
    other = grayscale(images)
    mean = other.mean((2, 3), keepdim=True)
    images.lerp_(other.mul_(use_gray).add_(mean * use_mean), share).clamp_(0, 1)


class HueNumbers(NamedTuple):
    """What `turn_hue_` does to each image: made by `number_hue`, used on the images' device."""

    sixths: Float[Tensor, "batch 1 1 1"]  # of the colour circle that each hue is turned by
    own: Float[Tensor, "3 1 1"]  # hues of red, green and blue


def number_hue(turns: Float[Tensor, " batch"]) -> HueNumbers | None:
    """Turns by `turns` of the colour circle (within [-0.5, 0.5], on the CPU); None where nothing turns."""
    if not bool(turns.any()):
        return None
    return HueNumbers((6 * turns)[:, None, None, None], torch.tensor([0.0, 2.0, -2.0])[:, None, None])


def turn_hue_(images: Float[Tensor, "batch 3 high wide"], numbers: HueNumbers) -> None:
    """Turn the hue of each image, in place.

    The HSV hexagon, as torchvision's adjust_hue, without going through S and V: largest and smallest channel
    of a pixel stay, only the hue moves. With green >= blue, hue in sixths of a turn is
    1 + (green - min + blue - red) / (max - min) in [0, 3]; otherwise minus that, by symmetry. Back again, a
    channel is min + (max - min) * clamp(2 - d, 0, 1), where d in [0, 3] is the distance between the
    hue and the channel's own on the circle of 6. A rotation in YIQ would be cheaper and gives other colours.
    """
    red, green, blue = images.chunk(3, dim=1)
    low = images.amin(1, keepdim=True)
    span = images.amax(1, keepdim=True).sub_(low)
    hue = (green - low).add_(blue).sub_(red)
    hue.div_(span.clamp_min(torch.finfo(span.dtype).tiny)).add_(1).copysign_(green - blue)
    hue.add_(numbers.sixths)
    hue.sub_((hue / 6).round_(), alpha=6)  # back to [-3, 3]
    # 2 - d for a distance of at most 5 measured either way round: ||distance| - 3| - 1
    torch.sub(hue, numbers.own, out=images)
    images.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(span).add_(low)


def blur_radius(sigma: float, side: int) -> int:
    """Reach in px of the blur kernel, 2 * radius + 1 wide, for the largest `sigma` on images of `side` px.

    Three sigma hold 99.7 % of a Gaussian, the rest is spread by normalisation. Small images take what
    mirroring at the border allows, so that any size works.
    """
    return min(math.ceil(3 * sigma), side - 1)


def weigh_taps(sigma: Float[Tensor, " batch"], *, radius: int) -> Float[Tensor, "batch taps 1 1 1"]:
    """Weights of a Gaussian of each `sigma` px at distance 0 to `radius` px, on the CPU."""
    reach = torch.arange(radius + 1)
    # NumPy's: for torch's, some machines wake all their threads, which takes milliseconds
    weights = torch.from_numpy(np.exp(-0.5 * (reach / sigma[:, None].double()).numpy() ** 2))
    weights /= 2 * weights.sum(1, keepdim=True) - weights[:, :1]
    return weights.float()[..., None, None, None]


def gaussian_blur(
    images: Float[Tensor, "batch 3 high wide"], taps: Float[Tensor, "batch taps 1 1 1"]
) -> Float[Tensor, "batch 3 high wide"]:
    """Each image under a Gaussian of its own `taps` (see `weigh_taps`), mirrored at the border.

    Rows, then columns, one shifted pair of pixels at a time: equal weights left and right are added before
    they are weighed. That is slower than a good depthwise convolution and many times faster than a bad one
    (on CPUs it depends on the channel count), and has no reduced-precision mode that could be switched on.
    """
    tap = taps.unbind(1)
    radius = len(tap) - 1
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    for dim in (3, 2):
        side = images.shape[dim]
        total = padded.narrow(dim, radius, side) * tap[0]
        pair = torch.empty_like(total)
        for step in range(1, radius + 1):
            torch.add(
                padded.narrow(dim, radius - step, side), padded.narrow(dim, radius + step, side), out=pair
            )
            total.addcmul_(pair, tap[step])
        padded = total
    return padded
