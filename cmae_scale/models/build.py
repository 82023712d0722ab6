"""The encoder of a run file."""

from cmae_scale.config.cmae import ModelConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.models.encoder import Encoder, ImageEncoder
from cmae_scale.models.hybrid import HybridEncoder


def build_encoder(model: ModelConfig, *, img_px: int, final_norm: bool = True) -> ImageEncoder:
    """The plain transformer or the hybrid that `model` asks for, with torch's own starting values."""
    size, stages, grid = read_size(model), read_stages(model), img_px // model.patch_size
    if stages is None:
        return Encoder(
            size,
            patch_size=model.patch_size,
            grid=grid,
            mlp_ratio=model.mlp_ratio,
            final_norm=final_norm,
        )
    return HybridEncoder(
        size,
        stages,
        patch_size=model.patch_size,
        grid=grid,
        mlp_ratio=model.mlp_ratio,
        final_norm=final_norm,
    )
