"""Mixup and cutmix in pairs of neighbouring rows, with every random number of a global batch drawn at once.

Differs: timm and the official code pair the rows of one GPU's batch (reversed, permuted). Neighbours in the
global batch are as random, because the batch is shuffled, and do not depend on how many GPUs share it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from cmae_scale.config.transfer import FinetuneConfig

_DRAWS = 4  # words of a group, used or not: switch, box centre (2), seed of the beta draw


@dataclass(frozen=True)
class MixNumbers:
    """For each row, how much of itself it keeps (mixup), or the box that it takes from its partner (cutmix).

    On the CPU. `share` is of the labels too: for cutmix, one minus the box's share of the area.
    """

    share: Float[Tensor, " rows"]
    is_cut: Bool[Tensor, " rows"]
    box: Int[Tensor, "rows 4"]  # top, bottom, left, right; px

    def rows(self, first: int, count: int) -> "MixNumbers":
        """The numbers of rows `first` .. `first + count - 1`."""
        part = slice(first, first + count)
        return MixNumbers(self.share[part], self.is_cut[part], self.box[part])


def draw_mixes(total: int, *, cfg: FinetuneConfig, img_px: int, rng: torch.Generator) -> MixNumbers:
    """One draw for every `cfg.mix_rows` rows of a global batch of `total`, from a CPU generator.

    Source: timm Mixup, "batch" mode with probability 1: which of the two, then lambda ~ beta(alpha, alpha),
    then a box whose area is 1 - lambda before it is clipped to the image.
    """
    groups = -(-total // cfg.mix_rows)
    words = torch.rand(groups, _DRAWS, generator=rng, dtype=torch.float64).numpy()
    shares, cuts, boxes = [], [], []
    for switch, high, wide, seed in words:
        is_cut = cfg.cutmix > 0 and (not cfg.mixup or switch < cfg.switch_p)
        alpha = cfg.cutmix if is_cut else cfg.mixup
        share = float(np.random.default_rng(int(seed * 2**53)).beta(alpha, alpha))
        box = cut_box(share, centre=(int(high * img_px), int(wide * img_px)), img_px=img_px)
        if is_cut:
            share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / img_px**2
        shares.append(share)
        cuts.append(is_cut)
        boxes.append(box)
    of_row = torch.arange(total) // cfg.mix_rows
    return MixNumbers(torch.tensor(shares)[of_row], torch.tensor(cuts)[of_row], torch.tensor(boxes)[of_row])


def cut_box(share: float, *, centre: tuple[int, int], img_px: int) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the box that leaves `share` of the image, clipped to it.

    Source: timm rand_bbox.
    """
    side = int(img_px * np.sqrt(1 - share))
    edges = []
    for middle in centre:
        low, high = middle - side // 2, middle + (side + 1) // 2
        edges += [min(max(low, 0), img_px), min(max(high, 0), img_px)]
    return edges[0], edges[1], edges[2], edges[3]


def mix_images(
    images: Float[Tensor, "rows 3 side side"], numbers: MixNumbers
) -> Float[Tensor, "rows 3 side side"]:
    """Each image mixed with its partner, row i with row i ^ 1."""
    partner = swap_pairs(images)
    share = numbers.share.to(images.device, images.dtype, non_blocking=True)[:, None, None, None]
    is_cut = numbers.is_cut.to(images.device, non_blocking=True)[:, None, None, None]
    mixed = torch.lerp(partner, images, share)
    return torch.where(is_cut, torch.where(_inside(images, numbers.box), partner, images), mixed)


def mix_labels(
    labels: Int64[Tensor, " rows"], numbers: MixNumbers | None, *, classes: int, smoothing: float
) -> Float[Tensor, "rows classes"]:
    """Smoothed one-hot labels, mixed as the images were. Source: timm mixup_target."""
    off = smoothing / classes
    target = torch.full((len(labels), classes), off, device=labels.device)
    target.scatter_(1, labels[:, None], 1 - smoothing + off)
    if numbers is None:
        return target
    share = numbers.share.to(labels.device, non_blocking=True)[:, None].float()
    return torch.lerp(swap_pairs(target), target, share)


def swap_pairs(rows: Float[Tensor, "rows *rest"]) -> Float[Tensor, "rows *rest"]:
    """Rows 1, 0, 3, 2, ...; their number must be even."""
    assert len(rows) % 2 == 0, f"{len(rows)} rows have no partners"
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).flatten(0, 1)


def _inside(
    images: Float[Tensor, "rows 3 side side"], box: Int[Tensor, "rows 4"]
) -> Bool[Tensor, "rows 1 side side"]:
    top, bottom, left, right = box.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    place = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)
    return rows[:, None, :, None] & columns[:, None, None, :]
