"""Square windows of many images at once: crop and mirror, a copy of bytes and nothing else."""

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor


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
