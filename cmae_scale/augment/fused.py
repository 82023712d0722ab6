"""Both views of a batch by Triton kernels, in few passes over the pixels; what they compute is in `views.py`.

Every image has a row of numbers, and a pixel goes through all colour operations in registers. Sums run in a
fixed order, so that the same images and numbers give the same bits. They differ from `views.py` by the
rounding of float32.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from cmae_scale.augment.color import blur_radius, weigh_taps
from cmae_scale.augment.draws import CONTRAST, HUE, SATURATION, ViewNumbers
from cmae_scale.config.cmae import ViewsConfig

PIXELS = 1024  # of a program

# columns of a row of numbers
FLIP, LEFT, TOP, JITTER, GRAY, BLUR, TURN = (tl.constexpr(number) for number in range(7))
STEPS = tl.constexpr(7)  # from here on four numbers for each of the four places in the order of operations
SHARE, USES_GRAY, USES_MEAN, IS_HUE = (tl.constexpr(number) for number in range(4))
COLUMNS = tl.constexpr(23)

RED, GREEN, BLUE = (tl.constexpr(weight) for weight in (0.2989, 0.587, 0.114))  # Source: ITU-R BT.601
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def tabulate(numbers: ViewNumbers) -> Float[Tensor, "batch columns"]:
    """What happens to each image on the way to its target view, in the order of the columns above."""
    order = numbers.order
    factors = torch.stack([numbers.brightness, numbers.contrast, numbers.saturation, numbers.hue], dim=1)
    steps = [1 - factors.gather(1, order), order == SATURATION, order == CONTRAST, order == HUE]
    single = [
        numbers.flip,
        numbers.shift_x,
        numbers.shift_y,
        numbers.jitter,
        numbers.gray,
        numbers.blur,
        6 * numbers.hue,
    ]
    columns = [column.float()[:, None] for column in single]
    return torch.cat([*columns, torch.stack([step.float() for step in steps], dim=-1).flatten(1)], dim=1)


def list_blurred(
    numbers: ViewNumbers, *, views: ViewsConfig
) -> tuple[Int[Tensor, " some"], Float[Tensor, "some taps"]]:
    """The images that are blurred, and the weights of their Gaussians."""
    rows = numbers.blur.nonzero().flatten()
    radius = blur_radius(views.color_ops.blur_sigma[1], views.img_px)
    return rows, weigh_taps(numbers.sigma[rows], radius=radius).flatten(1)


def write_online_(
    online: Float[Tensor, "batch 3 side side"],
    images: UInt8[Tensor, "batch crops 3 master master"],
    table: Float[Tensor, "batch columns"],
    *,
    views: ViewsConfig,
) -> None:
    """Fill `online` with the top-left square of each (flipped) master, normalised."""
    batch, crops, _, master, _ = images.shape
    grid = (batch, triton.cdiv(views.img_px**2, PIXELS))
    _online[grid](
        images, table, online, crops, master, views.img_px, *_whiten(views, white=255.0), PIXELS=PIXELS
    )


def write_target_(
    target: Float[Tensor, "batch 3 side side"],
    images: UInt8[Tensor, "batch crops 3 master master"],
    table: Float[Tensor, "batch columns"],
    blurred: Int[Tensor, " some"],
    taps: Float[Tensor, "some taps"],
    *,
    views: ViewsConfig,
) -> None:
    """Fill `target` with the target view of each (flipped) master, or of its second one, normalised."""
    batch, crops, _, master, _ = images.shape
    side, crop = views.img_px, 1 if views.target_crop == "random" else 0
    parts = triton.cdiv(side**2, PIXELS)
    sums = torch.empty(batch, parts, device=images.device)
    where = (crops, crop, master, side)
    _sum_gray[batch, parts](images, table, sums, *where, PIXELS=PIXELS)
    channels = _whiten(views, white=1.0)
    room = triton.next_power_of_2(parts)
    _target[batch, parts](images, table, sums, target, *where, parts, *channels, PIXELS=PIXELS, PARTS=room)
    if len(blurred):
        between = torch.empty(len(blurred), *target.shape[1:], device=images.device)
        grid, radius = (len(blurred), 3, parts), taps.shape[1] - 1
        _blur_rows[grid](target, between, blurred, taps, side, radius, PIXELS=PIXELS)
        _blur_columns[grid](between, target, blurred, taps, side, radius, *channels, PIXELS=PIXELS)


def _whiten(views: ViewsConfig, *, white: float) -> list[float]:
    """What is taken away from red, green and blue in [0, white], then what they are divided by."""
    return [white * number for number in (*views.mean, *views.std)]


@triton.jit
def _load(images, start, pixel, master, side, left, top, flip):
    """Red, green and blue of some pixels of a window, from 0 to 255."""
    y, x = pixel // side, pixel % side
    # mirroring the master and cutting at `left` is cutting at the mirrored place and mirroring the window
    column = tl.where(flip, master - 1 - left - x, left + x)
    place = images + start + (top + y) * master + column
    inside = pixel < side * side
    plane = master * master
    red = tl.load(place, mask=inside, other=0).to(tl.float32)
    green = tl.load(place + plane, mask=inside, other=0).to(tl.float32)
    blue = tl.load(place + 2 * plane, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _luma(red, green, blue):
    return red * RED + green * GREEN + blue * BLUE


@triton.jit
def _mix(value, other, share):
    """As torch.lerp, then cut off at 0 and 1."""
    mixed = tl.where(share < 0.5, value + share * (other - value), other - (other - value) * (1 - share))
    return tl.minimum(tl.maximum(mixed, 0.0), 1.0)


@triton.jit
def _turn_channel(hue, own, low, span):
    near = tl.abs(tl.abs(hue - own) - 3) - 1
    return low + span * tl.minimum(tl.maximum(near, 0.0), 1.0)


@triton.jit
def _turn(red, green, blue, sixths):
    """See color.turn_hue_."""
    low = tl.minimum(red, tl.minimum(green, blue))
    span = tl.maximum(red, tl.maximum(green, blue)) - low
    hue = (green - low + blue - red) / tl.maximum(span, TINY) + 1
    hue = tl.where(green - blue >= 0, tl.abs(hue), -tl.abs(hue)) + sixths
    hue = hue - 6 * tl.floor(hue / 6 + 0.5)
    return (
        _turn_channel(hue, 0.0, low, span),
        _turn_channel(hue, 2.0, low, span),
        _turn_channel(hue, -2.0, low, span),
    )


@triton.jit
def _step(red, green, blue, numbers, place, mean):
    """The operation at `place` of the image's order, with the mean grey of the image as it is then."""
    step = numbers + STEPS + 4 * place
    if tl.load(step + IS_HUE) > 0:
        red, green, blue = _turn(red, green, blue, tl.load(numbers + TURN))
    else:
        share = tl.load(step + SHARE)
        other = _luma(red, green, blue) * tl.load(step + USES_GRAY) + mean * tl.load(step + USES_MEAN)
        red, green, blue = _mix(red, other, share), _mix(green, other, share), _mix(blue, other, share)
    return red, green, blue


@triton.jit
def _online(
    images,
    table,
    online,
    crops,
    master,
    side,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    PIXELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    flip = tl.load(table + row * COLUMNS + FLIP) > 0
    start = row * crops * 3 * master * master
    red, green, blue = _load(images, start, pixel, master, side, 0, 0, flip)
    inside, plane = pixel < side * side, side * side
    out = online + row * 3 * plane + pixel
    tl.store(out, (red - red_mean) / red_std, mask=inside)
    tl.store(out + plane, (green - green_mean) / green_std, mask=inside)
    tl.store(out + 2 * plane, (blue - blue_mean) / blue_std, mask=inside)


@triton.jit
def _load_target(images, table, row, pixel, crops, crop, master, side):
    """Colours in [0, 1] of some pixels of the target's window."""
    numbers = table + row * COLUMNS
    start = (row * crops + crop) * 3 * master * master
    left, top = tl.load(numbers + LEFT).to(tl.int32), tl.load(numbers + TOP).to(tl.int32)
    flip = tl.load(numbers + FLIP) > 0
    red, green, blue = _load(images, start, pixel, master, side, left, top, flip)
    return red / 255, green / 255, blue / 255


@triton.jit
def _sum_gray(images, table, sums, crops, crop, master, side, PIXELS: tl.constexpr):
    """The sum of grey of some pixels, as they are where the mean grey is asked for."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers = table + row * COLUMNS
    total = 0.0
    if tl.load(numbers + JITTER) > 0:
        pixel = part * PIXELS + tl.arange(0, PIXELS)
        red, green, blue = _load_target(images, table, row, pixel, crops, crop, master, side)
        is_before = True
        for place in tl.static_range(4):
            is_before = is_before & (tl.load(numbers + STEPS + 4 * place + USES_MEAN) == 0)
            if is_before:
                red, green, blue = _step(red, green, blue, numbers, place, 0.0)
        total = tl.sum(tl.where(pixel < side * side, _luma(red, green, blue), 0.0))
    tl.store(sums + row * tl.num_programs(1) + part, total)


@triton.jit
def _target(
    images,
    table,
    sums,
    target,
    crops,
    crop,
    master,
    side,
    parts,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    numbers = table + row * COLUMNS
    red, green, blue = _load_target(images, table, row, pixel, crops, crop, master, side)
    if tl.load(numbers + JITTER) > 0:
        part = tl.arange(0, PARTS)
        mean = tl.sum(tl.load(sums + row * parts + part, mask=part < parts, other=0.0)) / (side * side)
        for place in tl.static_range(4):
            red, green, blue = _step(red, green, blue, numbers, place, mean)
    if tl.load(numbers + GRAY) > 0:
        gray = _luma(red, green, blue)
        red, green, blue = gray, gray, gray
    if tl.load(numbers + BLUR) == 0:  # else after it
        red, green, blue = (
            (red - red_mean) / red_std,
            (green - green_mean) / green_std,
            (blue - blue_mean) / blue_std,
        )
    inside, plane = pixel < side * side, side * side
    out = target + row * 3 * plane + pixel
    tl.store(out, red, mask=inside)
    tl.store(out + plane, green, mask=inside)
    tl.store(out + 2 * plane, blue, mask=inside)


@triton.jit
def _mirror(place, side):
    """Numbers of pixels beyond the border, mirrored at the outermost."""
    place = tl.abs(place)
    return tl.where(place >= side, 2 * (side - 1) - place, place)


@triton.jit
def _blur_rows(target, between, blurred, taps, side, radius, PIXELS: tl.constexpr):
    number, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    y, x, plane = pixel // side, pixel % side, side * side
    inside = pixel < plane
    source = target + (tl.load(blurred + number) * 3 + channel) * plane + y * side
    weights = taps + number * (radius + 1)
    total = tl.load(source + x, mask=inside, other=0.0) * tl.load(weights)
    for step in range(1, radius + 1):
        left = tl.load(source + _mirror(x - step, side), mask=inside, other=0.0)
        right = tl.load(source + _mirror(x + step, side), mask=inside, other=0.0)
        total += (left + right) * tl.load(weights + step)
    tl.store(between + (number * 3 + channel) * plane + pixel, total, mask=inside)


@triton.jit
def _blur_columns(
    between,
    target,
    blurred,
    taps,
    side,
    radius,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    PIXELS: tl.constexpr,
):
    number, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    y, x, plane = pixel // side, pixel % side, side * side
    inside = pixel < plane
    source = between + (number * 3 + channel) * plane + x
    weights = taps + number * (radius + 1)
    total = tl.load(source + y * side, mask=inside, other=0.0) * tl.load(weights)
    for step in range(1, radius + 1):
        above = tl.load(source + _mirror(y - step, side) * side, mask=inside, other=0.0)
        below = tl.load(source + _mirror(y + step, side) * side, mask=inside, other=0.0)
        total += (above + below) * tl.load(weights + step)
    mean = tl.where(channel == 0, red_mean, tl.where(channel == 1, green_mean, blue_mean))
    std = tl.where(channel == 0, red_std, tl.where(channel == 1, green_std, blue_std))
    out = target + (tl.load(blurred + number) * 3 + channel) * plane + pixel
    tl.store(out, (total - mean) / std, mask=inside)
