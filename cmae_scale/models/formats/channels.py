"""Weights that were trained on BGR images, for RGB images."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB. Source: ImageNet, official CMAE config


def swap_to_rgb(
    tensors: Mapping[str, Tensor], *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> dict[str, Tensor]:
    """The same model for images that are RGB and normalised by `mean` and `std` channel by channel.

    The official CMAE pipeline swaps the channels after loading and then normalises them with RGB's moments.
    Both are affine in each channel, so the patch embeddings take them in exactly: the features stay the same.
    The pixel decoder's outputs are put in RGB's order; its patches were normalised with the other moments, so
    its pixels are right up to that. Source: ZhichengHuang/CMAE configs, datasets/pipelines.
    """
    swapped = dict(tensors)
    means, deviations = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    for name in tensors:
        if name.endswith("_encoder.patch_embed.proj.weight"):
            weight = tensors[name].double()
            bias_name = name.removesuffix("weight") + "bias"
            # official channel k is RGB channel 2 - k, minus RGB's k-th mean, over RGB's k-th deviation
            shift = (means.flip(0) - means) / deviations
            scaled = weight * (deviations.flip(0) / deviations)[:, None, None]
            swapped[name] = scaled.flip(1).to(tensors[name].dtype)
            moved = (weight.sum(dim=(2, 3)) * shift).sum(dim=1)
            swapped[bias_name] = (tensors[bias_name].double() + moved).to(tensors[bias_name].dtype)
        elif name.startswith("pixel_decoder.predict."):
            values = tensors[name]
            swapped[name] = values.view(-1, 3, *values.shape[1:]).flip(1).reshape(values.shape)
    return swapped
