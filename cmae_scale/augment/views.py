"""The online and the target view of a batch of master images."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cmae_scale.augment.color import blur_radius, gaussian_blur, grayscale, jitter_
from cmae_scale.augment.draws import HUE, ViewNumbers
from cmae_scale.config.cmae import ViewsConfig


def cut_windows(
    images: UInt8[Tensor, "batch crops channels master master"],
    rows: Int[Tensor, " some"],
    *,
    crop: int,
    top: Int[Tensor, " some"],
    left: Int[Tensor, " some"],
    flip: Bool[Tensor, " some"],
    side: int,
) -> UInt8[Tensor, "some channels side side"]:
    """Window i is cut at (top[i], left[i]) from crop `crop` of image rows[i], mirrored first where flip[i].

    `rows`, `top`, `left` and `flip` are on the CPU; nothing is read back from the images' device.
    A window is `side` pieces of `side` neighbouring bytes per channel: seeing the images as one long line and
    picking those pieces by their first byte is plain memory copy, ten times as fast as gathering bytes.
    """
    _, crops, channels, master, _ = images.shape
    device, count = images.device, len(rows)
    # Mirroring the master and cutting at `left` is cutting at the mirrored place and mirroring the window.
    left = torch.where(flip, master - side - left, left)
    corner = (rows * crops + crop) * channels * master**2 + top * master + left
    line = (
        torch.arange(side, device=device) * master
        + torch.arange(channels, device=device)[:, None] * master**2
    )
    starts = corner.to(device, non_blocking=True)[:, None, None] + line
    flat = images.reshape(-1)
    pieces = flat.as_strided((flat.numel() - side + 1, side), (1, 1))
    windows = pieces.index_select(0, starts.flatten()).view(count, channels, side, side)
    # Mirror all and choose: two byte copies, no scattered write.
    choice = torch.arange(count) + count * flip
    return torch.cat([windows, windows.flip(-1)]).index_select(0, choice.to(device, non_blocking=True))


# Float bytes of the images worked on together. Does not change results. On a CPU a group and its temporaries
# stay in the cache; elsewhere few launches count, and that memory stays bounded.
_GROUP_BYTES_CPU = 2**22
_GROUP_BYTES = 2**28


@torch.no_grad()
def online_view(
    images: UInt8[Tensor, "batch crops 3 master master"], numbers: ViewNumbers, *, views: ViewsConfig
) -> Float[Tensor, "batch 3 side side"]:
    """The top-left img_px square of each (flipped) master, normalised, on its device, without colour change.

    A plain MAE needs no more than this. `numbers` has the same rows as `images`. Source: paper 3.2; official
    pipelines: the flip is of the master.
    """
    online = _empty_view(images, numbers, views=views)
    for group in _groups(online):
        part = numbers.pick(group)
        windows = cut_windows(
            images[group],
            torch.arange(len(part)),
            crop=0,
            top=torch.zeros_like(part.shift_y),
            left=torch.zeros_like(part.shift_x),
            flip=part.flip,
            side=views.img_px,
        )
        _normalise_(online[group].copy_(windows), views=views, white=255.0)
    return online


@torch.no_grad()
def target_view(
    images: UInt8[Tensor, "batch crops 3 master master"], numbers: ViewNumbers, *, views: ViewsConfig
) -> Float[Tensor, "batch 3 side side"]:
    """The shifted square of each (flipped) master, or the top-left one of the second master; then colour."""
    target = _empty_view(images, numbers, views=views)
    for group in _groups(target):
        _write_target_(target[group], images[group], numbers.pick(group), views=views)
        _normalise_(target[group], views=views, white=1.0)
    return target


def denormalise(
    images: Float[Tensor, "batch 3 side side"], *, views: ViewsConfig
) -> Float[Tensor, "batch 3 side side"]:
    """RGB in [0, 1] of normalised images, for pictures; what lies outside is clipped."""
    mean, std = _channels(images, views=views)
    return (images * std + mean).clamp(0, 1)


def _write_target_(
    target: Float[Tensor, "batch 3 side side"],
    images: UInt8[Tensor, "batch crops 3 master master"],
    numbers: ViewNumbers,
    *,
    views: ViewsConfig,
) -> None:
    """Fill `target` with the target views in [0, 1] of one group of images."""
    # jitter_ wants the images sorted by the place of hue in their order; those without jitter come first.
    hue_place = (numbers.order == HUE).int().argmax(1)
    rows = torch.where(numbers.jitter, hue_place, -1).argsort(stable=True)
    numbers = numbers.pick(rows)
    work = cut_windows(
        images,
        rows,
        crop=1 if views.target_crop == "random" else 0,
        top=numbers.shift_y,
        left=numbers.shift_x,
        flip=numbers.flip,
        side=views.img_px,
    )
    work = work.to(torch.float32).div_(255)
    plain = len(numbers) - int(numbers.jitter.sum())
    factors = torch.stack([numbers.brightness, numbers.contrast, numbers.saturation, numbers.hue], dim=1)
    if plain < len(numbers):
        jitter_(work[plain:], order=numbers.order[plain:], factors=factors[plain:])
    gray = numbers.gray.nonzero().flatten()
    if len(gray):
        gray = gray.to(work.device, non_blocking=True)
        work.index_copy_(0, gray, grayscale(work.index_select(0, gray)).expand(-1, 3, -1, -1))
    # Blurred images are appended, and putting the rows back in order picks them from there.
    blur = numbers.blur.nonzero().flatten()
    back = torch.arange(len(rows))
    if len(blur):
        back[blur] = len(rows) + torch.arange(len(blur))
        blurred = gaussian_blur(
            work.index_select(0, blur.to(work.device, non_blocking=True)),
            numbers.sigma[blur],
            radius=blur_radius(views.color_ops.blur_sigma[1], views.img_px),
        )
        work = torch.cat([work, blurred])
    torch.index_select(work, 0, back[rows.argsort()].to(work.device, non_blocking=True), out=target)


def _empty_view(
    images: UInt8[Tensor, "batch crops 3 master master"], numbers: ViewNumbers, *, views: ViewsConfig
) -> Float[Tensor, "batch 3 side side"]:
    crops = 2 if views.target_crop == "random" else 1
    wanted = (len(numbers), crops, 3, views.master_px, views.master_px)
    assert images.shape == wanted, f"master images are {tuple(images.shape)}, not {wanted}"
    assert images.dtype == torch.uint8, f"master images are {images.dtype}, not uint8"
    return torch.empty(len(images), 3, views.img_px, views.img_px, device=images.device)


def _groups(images: Float[Tensor, "batch 3 side side"]) -> Iterator[slice]:
    """The rows of `images` in neighbouring groups of a size that suits its device."""
    limit = _GROUP_BYTES_CPU if images.device.type == "cpu" else _GROUP_BYTES
    size = max(1, limit // (images[0].numel() * images.element_size())) if len(images) else 1
    return (slice(first, first + size) for first in range(0, len(images), size))


def _channels(images: Float[Tensor, "batch 3 side side"], *, views: ViewsConfig) -> tuple[Tensor, Tensor]:
    """Mean and std as [3, 1, 1] beside `images`."""
    mean, std = torch.tensor([views.mean, views.std]).to(images.device, non_blocking=True)[..., None, None]
    return mean, std


def _normalise_(images: Float[Tensor, "batch 3 side side"], *, views: ViewsConfig, white: float) -> None:
    """From [0, white] to zero mean and unit deviation over the training set, in place."""
    mean, std = _channels(images, views=views)
    images.sub_(mean * white).div_(std * white)


@torch.no_grad()
def normalise(
    images: UInt8[Tensor, "batch 3 side side"], *, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "batch 3 side side"]:
    """Images with `mean` (of RGB in [0, 1]) taken away and divided by `std`, on their own device."""
    centre, spread = torch.tensor([list(mean), list(std)]).to(images.device, non_blocking=True)[
        ..., None, None
    ]
    return images.float().sub_(centre * 255).div_(spread * 255)
