"""The named sizes of the encoders."""

from typing import NamedTuple

from cmae_scale.config.cmae import EncoderName, ModelConfig

FINE, COARSE = 4, 2  # sites along a side of a patch in the first and in the second stage. Source: ConvMAE
KERNEL = 5  # of the depthwise convolutions. Source: Alpha-VL/ConvMAE vision_transformer.py


class EncoderSize(NamedTuple):
    """What tells one vision transformer from another, in timm's words; of a hybrid, its last stage."""

    embed_dim: int
    depth: int
    num_heads: int


class ConvStages(NamedTuple):
    """The two convolutional stages before the transformer of a hybrid encoder."""

    dims: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratio: float


# Source: DeiT (tiny, small) and ViT (base, large, huge), as timm has them. MoCo v3's small has 12 heads.
NAMED_SIZES: dict[EncoderName, EncoderSize] = {
    "vit_tiny": EncoderSize(192, 12, 3),
    "vit_small": EncoderSize(384, 12, 6),
    "vit_base": EncoderSize(768, 12, 12),
    "vit_large": EncoderSize(1024, 24, 16),
    "vit_huge": EncoderSize(1280, 32, 16),
    "convvit_small": EncoderSize(384, 11, 6),
    "convvit_base": EncoderSize(768, 11, 12),
    "convvit_large": EncoderSize(1024, 23, 16),
}

# Source: Alpha-VL/ConvMAE for base, the only size in its code (arXiv:2205.03892). Small and large are as in
# public derivatives of it (FastConvMAE has small); other derivatives give small 12 heads.
NAMED_STAGES: dict[EncoderName, ConvStages] = {
    "convvit_small": ConvStages((128, 256), (2, 2), 4.0),
    "convvit_base": ConvStages((256, 384), (2, 2), 4.0),
    "convvit_large": ConvStages((384, 768), (2, 2), 8.0),
}


def read_size(model: ModelConfig) -> EncoderSize:
    """The size that the settings name, or spell out."""
    if model.encoder is not None:
        return NAMED_SIZES[model.encoder]
    embed_dim, depth, num_heads = model.embed_dim, model.depth, model.num_heads
    if embed_dim is None or depth is None or num_heads is None:
        raise AssertionError("ModelConfig asks for a name or for all three numbers")
    return EncoderSize(embed_dim, depth, num_heads)


def read_stages(model: ModelConfig) -> ConvStages | None:
    """The convolutional stages that the settings name, or spell out; None for a plain transformer."""
    if model.encoder is not None:
        return NAMED_STAGES.get(model.encoder)
    conv = model.conv
    return None if conv is None else ConvStages(conv.dims, conv.depths, conv.mlp_ratio)


def count_prefix(model: ModelConfig) -> int:
    """Tokens before the patches': a plain transformer has its class token, a hybrid none."""
    return 0 if model.is_hybrid else 1
