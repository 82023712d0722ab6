"""Numbers that each part learns or follows, in closed form: what a run must hold before anything is built."""

from collections.abc import Iterator
from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig, DecoderConfig, ModelConfig
from cmae_scale.config.sizes import COARSE, FINE, KERNEL, ConvStages, count_prefix, read_size, read_stages


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

    def head(width_in: int) -> int:
        return (width_in + 1) * cfg.heads.hidden_dim + cfg.heads.hidden_dim * (2 + cfg.heads.out_dim)

    pixels = model.pixel_decoder.embed_dim
    pixel_decoder = count_completion(model.pixel_decoder, width_in=width) + 2 * pixels + (pixels + 1) * values
    encoder = sum(count_encoder(model, final_norm=True))
    if not cfg.has_contrast:
        return ParameterCounts(encoder, pixel_decoder, 0, 0, 0, 0, 0)
    features = 2 * feature.embed_dim + (feature.embed_dim + 1) * width if feature.depth else 0
    if feature.depth and not feature.shared:
        features += count_completion(feature, width_in=width)
    return ParameterCounts(
        online_encoder=encoder,
        pixel_decoder=pixel_decoder,
        feature_decoder=features,
        projector=head(width),
        predictor=head(cfg.heads.out_dim),
        target_encoder=sum(count_encoder(model, final_norm=cfg.target.final_norm)),
        target_projector=head(width),
    )


def count_encoder(model: ModelConfig, *, final_norm: bool) -> tuple[int, ...]:
    """Parameters of the encoder's stages in forward order: one of a plain transformer, three of a hybrid."""
    size, stages = read_size(model), read_stages(model)
    width = size.embed_dim
    transformer = size.depth * count_block(width, mlp_ratio=model.mlp_ratio) + final_norm * 2 * width
    if stages is None:
        return (3 * model.patch_size**2 * width + width + width + transformer,)  # patches, bias, class token
    return (*_count_conv_stages(model, stages), _count_merging(stages, width=width) + transformer)


def _count_conv_stages(model: ModelConfig, stages: ConvStages) -> Iterator[int]:
    """Parameters of the two convolutional stages, each with the embedding and norm that make its sites."""
    before = 3 * (model.patch_size // FINE) ** 2
    for dim, depth in zip(stages.dims, stages.depths, strict=True):
        yield (before + 3) * dim + depth * count_conv_block(dim, mlp_ratio=stages.mlp_ratio)
        before = (FINE // COARSE) ** 2 * dim


def _count_merging(stages: ConvStages, *, width: int) -> int:
    """Parameters that make tokens of coarse sites, and those that bring both stages to the final sum."""
    fine, coarse = stages.dims
    merge, mix = (COARSE**2 * coarse + 3) * width, (width + 1) * width
    return merge + mix + (FINE**2 * fine + COARSE**2 * coarse + 2) * width


def count_buffers(cfg: CmaeConfig) -> int:
    """Numbers that the model holds beside its parameters: positions, and the running moments of the heads."""
    model, width = cfg.model, read_size(cfg.model).embed_dim
    tokens = (cfg.views.img_px // model.patch_size) ** 2 + count_prefix(model)
    pixels = tokens * (width + model.pixel_decoder.embed_dim)
    if not cfg.has_contrast:
        return pixels
    feature = model.feature_decoder
    features = tokens * feature.embed_dim if feature.depth and not feature.shared else 0
    moments = 3 * (2 * cfg.heads.hidden_dim + 1) if cfg.heads.norm == "sync_batch" else 0
    return pixels + features + tokens * width + moments


def count_rounded(cfg: CmaeConfig) -> int:
    """Trained weights that autocast rounds: of linear layers and convolutions outside of the heads."""
    model = cfg.model
    return (
        _count_encoder_products(model)
        + 3 * model.patch_size**2 * model.pixel_decoder.embed_dim
        + sum(
            read_size(model).embed_dim * decoder.embed_dim
            + decoder.depth * count_products(decoder.embed_dim, mlp_ratio=decoder.mlp_ratio)
            for decoder in _completions(cfg)
        )
    )


def count_sent_rounded(cfg: CmaeConfig) -> int:
    """Trained numbers that ranks send each other in autocast's format, biases too.

    Source: deepspeed/runtime/torch_autocast.py: of nn.Linear and nn.Conv2d, but not of classes derived from
    them. Heads and the convolutions that are run as matrix products are such classes.
    """
    size, model = read_size(cfg.model), cfg.model
    width, values, stages = size.embed_dim, 3 * model.patch_size**2, read_stages(model)
    total = size.depth * _count_linear(width, mlp_ratio=model.mlp_ratio)
    total += (model.pixel_decoder.embed_dim + 1) * values
    for decoder in _completions(cfg):
        total += (width + 1) * decoder.embed_dim
        total += decoder.depth * _count_linear(decoder.embed_dim, mlp_ratio=decoder.mlp_ratio)
    if stages is None:
        return total
    depthwise = sum(depth * dim for dim, depth in zip(stages.dims, stages.depths, strict=True))
    return total + depthwise * (KERNEL**2 + 1) + (width + 1) * width


def count_reordered(model: ModelConfig) -> int:
    """Weights that are copied into the order of sites before their product, whatever the formats are."""
    stages, width = read_stages(model), read_size(model).embed_dim
    if stages is None:
        return 0
    fine, coarse = stages.dims
    to_coarse, to_patches = (FINE // COARSE) ** 2 * fine * coarse, COARSE**2 * coarse * width
    return (
        to_coarse + to_patches + FINE**2 * fine * width + COARSE**2 * coarse * width
    )  # the last two: the sum


def _count_encoder_products(model: ModelConfig) -> int:
    """Weights of the encoder's matrix products and convolutions."""
    size, stages = read_size(model), read_stages(model)
    width, values = size.embed_dim, 3 * model.patch_size**2
    blocks = size.depth * count_products(width, mlp_ratio=model.mlp_ratio)
    if stages is None:
        return blocks + values * width
    convolutions = sum(
        depth * count_conv_products(dim, mlp_ratio=stages.mlp_ratio)
        for dim, depth in zip(stages.dims, stages.depths, strict=True)
    )
    stem = values // FINE**2 * stages.dims[0]
    return blocks + stem + convolutions + width * width + count_reordered(model)


def _completions(cfg: CmaeConfig) -> list[DecoderConfig]:
    """The decoders that complete tokens of their own."""
    feature = cfg.model.feature_decoder
    has_own = cfg.has_contrast and feature.depth and not feature.shared
    return [cfg.model.pixel_decoder, feature] if has_own else [cfg.model.pixel_decoder]


def count_products(width: int, *, mlp_ratio: float) -> int:
    """Weights of a block's four matrix products."""
    return 4 * width * width + 2 * width * int(width * mlp_ratio)


def count_conv_products(dim: int, *, mlp_ratio: float) -> int:
    """Weights of a convolutional block: four pointwise convolutions, a depthwise one."""
    return 2 * dim * (dim + int(dim * mlp_ratio)) + dim * KERNEL**2


def _count_linear(width: int, *, mlp_ratio: float) -> int:
    """Parameters of a transformer block's linear layers."""
    return count_products(width, mlp_ratio=mlp_ratio) + 5 * width + int(width * mlp_ratio)


def count_completion(decoder: DecoderConfig, *, width_in: int) -> int:
    """Parameters that complete the tokens: narrowing, the mask token, blocks."""
    width = decoder.embed_dim
    return (width_in + 1) * width + width + decoder.depth * count_block(width, mlp_ratio=decoder.mlp_ratio)


def count_block(width: int, *, mlp_ratio: float) -> int:
    """Parameters of a transformer block: two norms, four linear layers, a bias everywhere."""
    return _count_linear(width, mlp_ratio=mlp_ratio) + 4 * width


def count_conv_block(dim: int, *, mlp_ratio: float) -> int:
    """Parameters of a convolutional block: two norms, five convolutions, a bias everywhere."""
    return count_conv_products(dim, mlp_ratio=mlp_ratio) + 8 * dim + int(dim * mlp_ratio)
