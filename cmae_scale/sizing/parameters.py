"""Numbers that each part learns or follows, in closed form: what a run must hold before anything is built."""

from typing import NamedTuple

from cmae_scale.core.settings import CmaeConfig, DecoderConfig
from cmae_scale.sizing.sizes import read_size


class ParameterCounts(NamedTuple):
    """Parameters by part. The target's follow the online ones and get no gradient."""

    online_encoder: int
    pixel_decoder: int
    feature_decoder: int
    projector: int
    predictor: int
    target_encoder: int
    target_projector: int

    @property
    def trained(self) -> int:
        """Parameters with gradient and optimizer state."""
        return sum(self) - self.target

    @property
    def target(self) -> int:
        """Parameters of the moving average."""
        return self.target_encoder + self.target_projector


def count_parameters(cfg: CmaeConfig) -> ParameterCounts:
    """The parts' parameters for a run's model."""
    size, model = read_size(cfg.model), cfg.model
    width, values, feature = size.embed_dim, 3 * model.patch_size**2, model.feature_decoder

    def encoder(*, final_norm: bool) -> int:
        embedding = values * width + width + width  # patches with bias, class token
        return embedding + size.depth * count_block(width, mlp_ratio=model.mlp_ratio) + final_norm * 2 * width

    def head(width_in: int) -> int:
        return (width_in + 1) * cfg.heads.hidden_dim + cfg.heads.hidden_dim * (2 + cfg.heads.out_dim)

    pixels = model.pixel_decoder.embed_dim
    pixel_decoder = count_completion(model.pixel_decoder, width_in=width) + 2 * pixels + (pixels + 1) * values
    if not cfg.has_contrast:
        return ParameterCounts(encoder(final_norm=True), pixel_decoder, 0, 0, 0, 0, 0)
    features = 2 * feature.embed_dim + (feature.embed_dim + 1) * width if feature.depth else 0
    if feature.depth and not feature.shared:
        features += count_completion(feature, width_in=width)
    return ParameterCounts(
        online_encoder=encoder(final_norm=True),
        pixel_decoder=pixel_decoder,
        feature_decoder=features,
        projector=head(width),
        predictor=head(cfg.heads.out_dim),
        target_encoder=encoder(final_norm=cfg.target.final_norm),
        target_projector=head(width),
    )


def count_buffers(cfg: CmaeConfig) -> int:
    """Numbers that the model holds beside its parameters: positions, and the running moments of the heads."""
    model, width = cfg.model, read_size(cfg.model).embed_dim
    tokens = (cfg.views.img_px // model.patch_size) ** 2 + 1
    pixels = tokens * (width + model.pixel_decoder.embed_dim)
    if not cfg.has_contrast:
        return pixels
    feature = model.feature_decoder
    features = tokens * feature.embed_dim if feature.depth and not feature.shared else 0
    moments = 3 * (2 * cfg.heads.hidden_dim + 1) if cfg.heads.norm == "sync_batch" else 0
    return pixels + features + tokens * width + moments


def count_rounded(cfg: CmaeConfig) -> int:
    """Trained weights that autocast rounds for their products: of linear layers outside of the heads."""
    size, model = read_size(cfg.model), cfg.model
    width, values, feature = size.embed_dim, 3 * model.patch_size**2, model.feature_decoder
    decoders: list[DecoderConfig] = [model.pixel_decoder]
    if cfg.has_contrast and feature.depth and not feature.shared:
        decoders.append(feature)
    total = values * (width + model.pixel_decoder.embed_dim)
    total += size.depth * count_products(width, mlp_ratio=model.mlp_ratio)
    for decoder in decoders:
        total += width * decoder.embed_dim
        total += decoder.depth * count_products(decoder.embed_dim, mlp_ratio=decoder.mlp_ratio)
    return total


def count_products(width: int, *, mlp_ratio: float) -> int:
    """Weights of a block's four matrix products."""
    return 4 * width * width + 2 * width * int(width * mlp_ratio)


def count_completion(decoder: DecoderConfig, *, width_in: int) -> int:
    """Parameters that complete the tokens: narrowing, the mask token, blocks."""
    width = decoder.embed_dim
    return (width_in + 1) * width + width + decoder.depth * count_block(width, mlp_ratio=decoder.mlp_ratio)


def count_block(width: int, *, mlp_ratio: float) -> int:
    """Parameters of a transformer block: two norms, four linear layers, a bias everywhere."""
    return count_products(width, mlp_ratio=mlp_ratio) + 9 * width + int(width * mlp_ratio)
