"""The named sizes of the vision transformer."""

from typing import NamedTuple

from cmae_scale.core.settings import EncoderName, ModelConfig


class EncoderSize(NamedTuple):
    """What tells one vision transformer from another, in timm's words."""

    embed_dim: int
    depth: int
    num_heads: int


# Source: DeiT (tiny, small) and ViT (base, large, huge), as timm has them. MoCo v3's small has 12 heads.
NAMED_SIZES: dict[EncoderName, EncoderSize] = {
    "vit_tiny": EncoderSize(192, 12, 3),
    "vit_small": EncoderSize(384, 12, 6),
    "vit_base": EncoderSize(768, 12, 12),
    "vit_large": EncoderSize(1024, 24, 16),
    "vit_huge": EncoderSize(1280, 32, 16),
}


def read_size(model: ModelConfig) -> EncoderSize:
    """The size that the settings name, or spell out."""
    if model.encoder is not None:
        return NAMED_SIZES[model.encoder]
    embed_dim, depth, num_heads = model.embed_dim, model.depth, model.num_heads
    if embed_dim is None or depth is None or num_heads is None:
        raise AssertionError("ModelConfig asks for a name or for all three numbers")
    return EncoderSize(embed_dim, depth, num_heads)
