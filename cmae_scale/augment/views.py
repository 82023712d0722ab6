"""The online and the target view of a batch of master images."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from cmae_scale.augment.color import (
    JitterNumbers,
    blur_radius,
    gaussian_blur,
    grayscale,
    jitter_,
    number_jitter,
    weigh_taps,
)
from cmae_scale.augment.draws import HUE, ViewNumbers
from cmae_scale.config.cmae import ViewsConfig

T = TypeVar("T")
_ALIGNED = 16  # bytes at whose multiples a tensor of a parcel begins: a number of any type may lie there


class Windows(NamedTuple):
    """Which windows `cut_windows` cuts, as `place_windows` says it."""

    corner: Int[Tensor, "some 1 1"]  # where the window's first byte lies, all images seen as one line
    choice: Int[Tensor, " some"]  # the window itself, or `some` further its mirror image


def place_windows(
    rows: Int[Tensor, " some"],
    *,
    shape: torch.Size,
    crop: int,
    top: Int[Tensor, " some"],
    left: Int[Tensor, " some"],
    flip: Bool[Tensor, " some"],
    side: int,
) -> Windows:
    """Window i lies at (top[i], left[i]) of crop `crop` of image rows[i], mirrored first where flip[i].

    `shape` is that of the images, [batch, crops, channels, master, master]. All on the CPU.
    """
    _, crops, channels, master, _ = shape
    # Mirroring the master and cutting at `left` is cutting at the mirrored place and mirroring the window.
    left = torch.where(flip, master - side - left, left)
    corner = (rows * crops + crop) * channels * master**2 + top * master + left
    count = len(rows)
    return Windows(corner[:, None, None], torch.arange(count) + count * flip)


def cut_windows(
    images: UInt8[Tensor, "batch crops channels master master"], windows: Windows, *, side: int
) -> UInt8[Tensor, "some channels side side"]:
    """The windows of `side` px; nothing is read back from the images' device.

    A window is `side` pieces of `side` neighbouring bytes per channel: seeing the images as one long line and
    picking those pieces by their first byte is plain memory copy, ten times as fast as gathering bytes.
    """
    channels, master, device = images.shape[2], images.shape[-1], images.device
    line = (
        torch.arange(side, device=device) * master
        + torch.arange(channels, device=device)[:, None] * master**2
    )
    starts = windows.corner + line
    flat = images.reshape(-1)
    pieces = flat.as_strided((flat.numel() - side + 1, side), (1, 1))
    cut = pieces.index_select(0, starts.flatten()).view(-1, channels, side, side)
    # Mirror all and choose: two byte copies, no scattered write.
    return torch.cat([cut, cut.flip(-1)]).index_select(0, windows.choice)


# Float bytes of the images worked on together. Does not change results. On a CPU a group and its temporaries
# stay in the cache; elsewhere few launches count, and that memory stays bounded.
_GROUP_BYTES_CPU = 2**22
_GROUP_BYTES = 2**28


class Views(NamedTuple):
    """Views, and what travelled with their numbers; a view that was not asked for is None."""

    online: Float[Tensor, "batch 3 side side"] | None
    target: Float[Tensor, "batch 3 side side"] | None
    beside: tuple[Tensor, ...]


@torch.no_grad()
def make_views(
    images: UInt8[Tensor, "batch crops 3 master master"],
    numbers: ViewNumbers,
    *,
    views: ViewsConfig,
    online: bool = True,
    target: bool = True,
    beside: tuple[Tensor, ...] = (),
    is_fused: bool = False,
) -> Views:
    """The views asked for, normalised, on the images' device. `numbers` has the same rows as `images`.

    `is_fused` takes the Triton kernels of `fused.py`, for a GPU.

    The online view is the top-left img_px square of each (flipped) master, without colour change: a plain MAE
    needs no more. The target view is the shifted square, or the top-left one of the second master; then
    colour. All numbers travel to the device in one copy, and the tensors `beside` with them.

    Source: paper 3.2; official pipelines: the flip is of the master.
    """
    if is_fused:
        return _make_by_kernels(images, numbers, views=views, online=online, target=target, beside=beside)
    groups = list(_group_rows(images, numbers, views=views))
    parts = [numbers.pick(group) for group in groups]
    parcel = send(
        _Parcel(
            [_number_online(part, images.shape, views=views) for part in parts if online],
            [_number_target(part, images.shape, views=views) for part in parts if target],
            torch.tensor([views.mean, views.std])[..., None, None],
            beside,
        ),
        images.device,
    )
    shape = (len(images), 3, views.img_px, views.img_px)
    made = [torch.empty(shape, device=images.device) for is_wanted in (online, target) if is_wanted]
    if online:
        for group, windows in zip(groups, parcel.online, strict=True):
            cut = cut_windows(images[group], windows, side=views.img_px)
            _normalise_(made[0][group].copy_(cut), parcel.channels, white=255.0)
    if target:
        for group, own in zip(groups, parcel.target, strict=True):
            _write_target_(made[-1][group], images[group], own, side=views.img_px)
            _normalise_(made[-1][group], parcel.channels, white=1.0)
    return Views(made[0] if online else None, made[-1] if target else None, parcel.beside)


def _make_by_kernels(
    images: UInt8[Tensor, "batch crops 3 master master"],
    numbers: ViewNumbers,
    *,
    views: ViewsConfig,
    online: bool,
    target: bool,
    beside: tuple[Tensor, ...],
) -> Views:
    from cmae_scale.augment import fused  # Triton is no part of PyTorch for the CPU

    numbers_only = (fused.tabulate(numbers), *fused.list_blurred(numbers, views=views), beside)
    table, blurred, taps, beside = send(numbers_only, images.device)
    images = images.contiguous()
    shape = (len(images), 3, views.img_px, views.img_px)
    made = [torch.empty(shape, device=images.device) if wanted else None for wanted in (online, target)]
    if made[0] is not None:
        fused.write_online_(made[0], images, table, views=views)
    if made[1] is not None:
        fused.write_target_(made[1], images, table, blurred, taps, views=views)
    return Views(made[0], made[1], beside)


def denormalise(
    images: Float[Tensor, "batch 3 side side"], *, views: ViewsConfig
) -> Float[Tensor, "batch 3 side side"]:
    """RGB in [0, 1] of normalised images, for pictures; what lies outside is clipped."""
    mean, std = torch.tensor([views.mean, views.std]).to(images.device, non_blocking=True)[..., None, None]
    pictures: Tensor = (images * std + mean).clamp(0, 1)
    return pictures


class _TargetNumbers(NamedTuple):
    """What happens to the images of a group on the way to their target views."""

    windows: Windows
    plain: int  # images without jitter, which come first
    jitter: JitterNumbers | None
    gray: Int[Tensor, " some"] | None
    blur: Int[Tensor, " some"] | None
    taps: Float[Tensor, "some taps 1 1 1"] | None
    back: Int[Tensor, " batch"]  # where each image is in the end


class _Parcel(NamedTuple):
    """All that goes to the device beside the images, for one group of them after the other."""

    online: list[Windows]
    target: list[_TargetNumbers]
    channels: Float[Tensor, "2 3 1 1"]  # mean and std
    beside: tuple[Tensor, ...]


def _number_online(numbers: ViewNumbers, shape: torch.Size, *, views: ViewsConfig) -> Windows:
    return place_windows(
        torch.arange(len(numbers)),
        shape=shape,
        crop=0,
        top=torch.zeros_like(numbers.shift_y),
        left=torch.zeros_like(numbers.shift_x),
        flip=numbers.flip,
        side=views.img_px,
    )


def _number_target(numbers: ViewNumbers, shape: torch.Size, *, views: ViewsConfig) -> _TargetNumbers:
    # jitter_ wants the images sorted by the place of hue in their order; those without jitter come first.
    hue_place = (numbers.order == HUE).int().argmax(1)
    rows = torch.where(numbers.jitter, hue_place, -1).argsort(stable=True)
    numbers = numbers.pick(rows)
    windows = place_windows(
        rows,
        shape=shape,
        crop=1 if views.target_crop == "random" else 0,
        top=numbers.shift_y,
        left=numbers.shift_x,
        flip=numbers.flip,
        side=views.img_px,
    )
    plain = len(numbers) - int(numbers.jitter.sum())
    factors = torch.stack([numbers.brightness, numbers.contrast, numbers.saturation, numbers.hue], dim=1)
    has_jitter = plain < len(numbers)
    gray, blur = numbers.gray.nonzero().flatten(), numbers.blur.nonzero().flatten()
    # Blurred images are appended, and putting the rows back in order picks them from there.
    back = torch.arange(len(rows))
    back[blur] = len(rows) + torch.arange(len(blur))
    radius = blur_radius(views.color_ops.blur_sigma[1], views.img_px)
    return _TargetNumbers(
        windows,
        plain=plain,
        jitter=number_jitter(order=numbers.order[plain:], factors=factors[plain:]) if has_jitter else None,
        gray=gray if len(gray) else None,
        blur=blur if len(blur) else None,
        taps=weigh_taps(numbers.sigma[blur], radius=radius) if len(blur) else None,
        back=back[rows.argsort()],
    )


def _write_target_(
    target: Float[Tensor, "batch 3 side side"],
    images: UInt8[Tensor, "batch crops 3 master master"],
    numbers: _TargetNumbers,
    *,
    side: int,
) -> None:
    """Fill `target` with the target views in [0, 1] of one group of images."""
    work = cut_windows(images, numbers.windows, side=side).to(torch.float32).div_(255)
    if numbers.jitter is not None:
        jitter_(work[numbers.plain :], numbers.jitter)
    if numbers.gray is not None:
        gray = grayscale(work.index_select(0, numbers.gray))
        work.index_copy_(0, numbers.gray, gray.expand(-1, 3, -1, -1))
    if numbers.blur is not None and numbers.taps is not None:
        blurred = gaussian_blur(work.index_select(0, numbers.blur), numbers.taps)
        work = torch.cat([work, blurred])
    torch.index_select(work, 0, numbers.back, out=target)


def send(parcel: T, device: torch.device) -> T:
    """`parcel`, of tensors on the CPU in tuples and lists, on `device`: one copy however many they are.

    To a GPU it goes from page-locked memory, in the order of the current stream and without waiting. That
    memory is allocated anew each time: torch gives it to nobody else until the copy has been made.
    """
    if device.type == "cpu":
        return parcel
    leaves, tree = tree_flatten(parcel)
    tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    starts = list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")

    def unpack(memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(starts, sizes, tensors.values(), strict=False)
        ]

    for room, tensor in zip(unpack(packed), tensors.values(), strict=True):
        room.copy_(tensor)
    sent = dict(zip(tensors, unpack(packed.to(device, non_blocking=True)), strict=True))
    moved: T = tree_unflatten([sent.get(place, leaf) for place, leaf in enumerate(leaves)], tree)
    return moved


def _group_rows(
    images: UInt8[Tensor, "batch crops 3 master master"], numbers: ViewNumbers, *, views: ViewsConfig
) -> Iterator[slice]:
    """The rows in neighbouring groups of a size that suits the images' device."""
    crops = 2 if views.target_crop == "random" else 1
    wanted = (len(numbers), crops, 3, views.master_px, views.master_px)
    assert images.shape == wanted, f"master images are {tuple(images.shape)}, not {wanted}"
    assert images.dtype == torch.uint8, f"master images are {images.dtype}, not uint8"
    limit = _GROUP_BYTES_CPU if images.device.type == "cpu" else _GROUP_BYTES
    size = max(1, limit // (3 * views.img_px**2 * 4))
    return (slice(first, first + size) for first in range(0, len(images), size))


def _normalise_(
    images: Float[Tensor, "batch 3 side side"], channels: Float[Tensor, "2 3 1 1"], *, white: float
) -> None:
    """From [0, white] to zero mean and unit deviation over the training set, in place."""
    mean, std = channels
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
