"""Making foreign tensors fit: sizes from shapes, positions for another grid, BGR weights for RGB images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cmae_scale.config.cmae import (
    ConvConfig,
    FeatureDecoderConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    NetworkConfig,
    PixelDecoderConfig,
    TargetConfig,
    ViewsConfig,
)
from cmae_scale.config.sizes import NAMED_SIZES
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.tokens import sincos_positions

Tensors = Mapping[str, Tensor]
Key = TypeVar("Key", int, tuple[int, int])

DECODER_HEADS = {512: 16}  # Source: facebookresearch/mae models_mae.py, every size
# 768 x 8 is what the official CMAE code calls small. Source: ZhichengHuang/CMAE vision_transformer.py
ENCODER_HEADS = {(size.embed_dim, size.depth): size.num_heads for size in NAMED_SIZES.values()} | {
    (768, 8): 8
}

# how people say it: an option of convert, a setting of a transfer's run file
ENCODER_OPTION = "--num_heads N (transfer.encoder.num_heads in a run file)"
DECODER_OPTION = "--decoder_heads N"


@dataclass(frozen=True)
class HeadCounts:
    """How many attention heads there are, which no tensor's shape says; None takes the published number."""

    encoder: int | None = None
    pixel_decoder: int | None = None
    feature_decoder: int | None = None


@dataclass
class ShapeReader:
    """Reads numbers off shapes and remembers what had to be assumed."""

    tensors: Tensors
    heads: HeadCounts
    notices: list[str] = field(default_factory=list)

    def config(self) -> NetworkConfig:
        """The settings with which `CMAE` has these tensors; parts that the file lacks are small."""
        has_contrast = "projector.fc1.weight" in self.tensors
        img_px, model = self._model()
        return NetworkConfig(
            model=model,
            views=ViewsConfig(img_px=img_px, master_px=img_px, shift_px=0),
            heads=self._heads() if has_contrast else HeadsConfig(),
            loss=LossConfig(weight=1.0 if has_contrast else 0.0),
            target=TargetConfig(final_norm="target_encoder.norm.weight" in self.tensors),
        )

    def _model(self) -> tuple[int, ModelConfig]:
        is_hybrid = "online_encoder.patch_embed1.proj.weight" in self.tensors
        blocks = "online_encoder.blocks3" if is_hybrid else "online_encoder.blocks"
        positions = self._shape("online_encoder.pos_embed")
        embed_dim, depth = positions[-1], self._count(blocks)
        first = "online_encoder.patch_embed1" if is_hybrid else "online_encoder.patch_embed"
        patch_size = self._shape(f"{first}.proj.weight")[-1] * (4 if is_hybrid else 1)
        grid = round((positions[1] - (0 if is_hybrid else 1)) ** 0.5)
        if grid**2 != positions[1] - (0 if is_hybrid else 1):
            raise ConfigError(f"pos_embed has {positions[1]} places, which are no square of patches")
        model = ModelConfig(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=self.heads.encoder or self._assume(ENCODER_HEADS, (embed_dim, depth), ENCODER_OPTION),
            mlp_ratio=self._ratio(f"{blocks}.0.mlp", embed_dim),
            patch_size=patch_size,
            conv=self._conv() if is_hybrid else None,
            pixel_decoder=self._pixel_decoder(),
            feature_decoder=self._feature_decoder(),
        )
        return grid * patch_size, model

    def _conv(self) -> ConvConfig:
        stages = [f"online_encoder.blocks{stage}" for stage in (1, 2)]
        dims = [self._shape(f"online_encoder.patch_embed{stage}.proj.weight")[0] for stage in (1, 2)]
        return ConvConfig(
            dims=(dims[0], dims[1]),
            depths=(self._count(stages[0]), self._count(stages[1])),
            mlp_ratio=self._ratio(f"{stages[0]}.0.mlp", dims[0]),
        )

    def _pixel_decoder(self) -> PixelDecoderConfig:
        name = "pixel_decoder.completion"
        if f"{name}.mask_token" not in self.tensors:
            return PixelDecoderConfig()
        width = self._shape(f"{name}.mask_token")[-1]
        return PixelDecoderConfig(
            depth=self._count(f"{name}.blocks"),
            embed_dim=width,
            num_heads=self.heads.pixel_decoder or self._assume(DECODER_HEADS, width, DECODER_OPTION),
            mlp_ratio=self._ratio(f"{name}.blocks.0.mlp", width),
        )

    def _feature_decoder(self) -> FeatureDecoderConfig:
        name = "feature_decoder.completion"
        if f"{name}.mask_token" not in self.tensors:
            return FeatureDecoderConfig(depth=0)
        width = self._shape(f"{name}.mask_token")[-1]
        return FeatureDecoderConfig(
            depth=self._count(f"{name}.blocks"),
            embed_dim=width,
            num_heads=self.heads.feature_decoder or self._assume(DECODER_HEADS, width, DECODER_OPTION),
            mlp_ratio=self._ratio(f"{name}.blocks.0.mlp", width),
        )

    def _heads(self) -> HeadsConfig:
        return HeadsConfig(
            hidden_dim=self._shape("projector.fc1.weight")[0],
            out_dim=self._shape("projector.fc2.weight")[0],
            norm="sync_batch" if "projector.norm.running_mean" in self.tensors else "layer",
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ConfigError(f"the tensor {name} is missing, so the model's size cannot be told")
        return tuple(self.tensors[name].shape)

    def _count(self, blocks: str) -> int:
        """Blocks 0, 1, ... without a gap."""
        depth = 0
        while f"{blocks}.{depth}.norm1.weight" in self.tensors:
            depth += 1
        if not depth:
            raise ConfigError(f"there are no blocks {blocks}.0, so the model's depth cannot be told")
        return depth

    def _ratio(self, mlp: str, width: int) -> float:
        return self._shape(f"{mlp}.fc1.weight")[0] / width

    def _assume(self, known: Mapping[Key, int], key: Key, option: str) -> int:
        if key not in known:
            raise ConfigError(f"no shape tells the number of attention heads of {key}: say it with {option}")
        self.notices.append(f"{known[key]} attention heads assumed for {key}, as published ({option})")
        return known[key]


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


_SAME = 4e-3  # what rounding to bf16 makes of numbers up to 1


class Refitted(NamedTuple):
    """Positions of another grid, and whether they follow from a formula (else they were interpolated)."""

    positions: Float[Tensor, "1 tokens embed"]
    is_computed: bool


def refit_positions(positions: Float[Tensor, "1 places embed"], *, grid: int) -> Refitted:
    """`positions` of a square grid, with or without one for the class token, for grid x grid patches.

    Fixed sines and cosines, ours or MAE's (whose columns come before the rows), are those of the new grid.
    Others were learned: they are interpolated. Source: MAE util/pos_embed.py, timm (bicubic).
    """
    side, embed_dim = isqrt(positions.shape[1]), positions.shape[2]
    has_cls = positions.shape[1] > side**2
    known, new = (sincos_positions(patches, embed_dim, cls=has_cls) for patches in (side, grid))
    for order in (known, known.roll(embed_dim // 2, dims=2)):
        if torch.allclose(positions.float(), order, rtol=0, atol=_SAME):
            shift = 0 if order is known else embed_dim // 2
            return Refitted(new.roll(shift, dims=2), is_computed=True)
    resized = resample_abs_pos_embed(positions.float(), new_size=[grid, grid], num_prefix_tokens=int(has_cls))
    return Refitted(resized, is_computed=False)
