"""Floating-point operations per image of each part, in closed form: what a training step must at least do."""

from typing import NamedTuple

from cmae_scale.config.cmae import CmaeConfig, DecoderConfig, ModelConfig
from cmae_scale.config.sizes import COARSE, FINE, KERNEL, count_prefix, read_size, read_stages


class ForwardFlops(NamedTuple):
    """Matrix products of one image's forward pass, two operations per multiply-add, by part.

    Norms, activations, softmax and augmentation are left out, as in the field's figures for utilisation. With
    `model.skip_redundant`, so is all that it saves, and the query, key and value of mask tokens, which a
    micro-batch needs once, however many its images are.
    """

    online_encoder: int
    pixel_decoder: int
    feature_decoder: int
    heads: int  # projector and predictor
    target: int  # encoder and projector

    @property
    def training(self) -> int:
        """A training step's share: backward costs twice the forward pass, and the target has none.

        Recomputed activations do not count: they are a way to save memory, not work that had to be done.
        """
        return (
            3 * (self.online_encoder + self.pixel_decoder + self.feature_decoder + self.heads) + self.target
        )


def count_flops(cfg: CmaeConfig) -> ForwardFlops:
    """The parts' operations for a run's model, views and masks."""
    model = cfg.model
    width, values = read_size(model).embed_dim, 3 * model.patch_size**2
    prefix = count_prefix(model)
    grid = cfg.views.img_px // model.patch_size
    patches = grid**2
    kept = count_kept(grid, cell=cfg.mask.cell, ratio=cfg.mask.ratio)

    feature, pixel = model.feature_decoder, model.pixel_decoder

    def completion(decoder: DecoderConfig, *, unread: int) -> int:
        blocks = count_blocks(
            decoder.depth, width=decoder.embed_dim, mlp_ratio=decoder.mlp_ratio, tokens=patches + prefix
        )
        if model.skip_redundant:
            blocks -= 2 * (patches - kept) * 3 * decoder.embed_dim**2  # query, key, value of mask tokens
            blocks -= count_unread(unread, decoder=decoder, tokens=patches + prefix)
        return 2 * (kept + prefix) * width * decoder.embed_dim + blocks

    reads_all = cfg.has_contrast and feature.shared and feature.depth == pixel.depth
    pixels = completion(pixel, unread=0 if reads_all else kept + prefix)
    pixels += 2 * (patches - kept) * pixel.embed_dim * values
    online = count_encoder(model, seen=kept, patches=patches)
    if not cfg.has_contrast:
        return ForwardFlops(online, pixels, feature_decoder=0, heads=0, target=0)
    features = 2 * feature.embed_dim * width if feature.depth else 0  # one vector: it comes after the mean
    if feature.depth and not feature.shared:
        features += completion(feature, unread=0)
    hidden, out = cfg.heads.hidden_dim, cfg.heads.out_dim
    projector, predictor = 2 * hidden * (width + out), 2 * hidden * (out + out)
    seen = count_kept(grid, cell=cfg.mask.cell, ratio=cfg.target.mask_ratio)
    target = count_encoder(model, seen=seen, patches=patches) + projector
    if model.skip_redundant and cfg.target.pool == "mean" and not cfg.target.final_norm:
        target -= count_after_mean(model, seen=seen)
    return ForwardFlops(online, pixels, features, heads=projector + predictor, target=target)


def count_unread(unread: int, *, decoder: DecoderConfig, tokens: int) -> int:
    """What a block saves on `unread` of its `tokens` whose output nobody reads: all but query, key, value."""
    width = decoder.embed_dim
    return 2 * unread * width * (width + 2 * int(width * decoder.mlp_ratio) + 2 * tokens)


def count_after_mean(model: ModelConfig, *, seen: int) -> int:
    """What an encoder on `seen` patches saves if only their mean is read and no norm follows."""
    width, prefix, stages = read_size(model).embed_dim, count_prefix(model), read_stages(model)
    hidden, tokens = int(width * model.mlp_ratio), seen + prefix
    unread = 2 * prefix * width * (width + hidden + 2 * tokens)
    sums = sum(
        side**2 * dim for dim, side in zip(stages.dims if stages else (), (FINE, COARSE), strict=False)
    )
    return unread + 2 * (tokens - 1) * hidden * width + 2 * (seen - 1) * sums * width


def count_kept(grid: int, *, cell: int, ratio: float) -> int:
    """Patches of a grid x grid image that masking keeps. Source: official cmae_vit.py."""
    return int((grid // cell) ** 2 * (1 - ratio)) * cell**2


def count_encoder(model: ModelConfig, *, seen: int, patches: int) -> int:
    """Operations of the encoder on `seen` of an image's `patches`."""
    size, stages = read_size(model), read_stages(model)
    width = size.embed_dim
    prefix = count_prefix(model)
    blocks = count_blocks(size.depth, width=width, mlp_ratio=model.mlp_ratio, tokens=seen + prefix)
    if stages is None:
        return 2 * seen * 3 * model.patch_size**2 * width + blocks
    total, before = blocks + 2 * seen * width**2, 3 * (model.patch_size // FINE) ** 2
    for dim, depth, side in zip(stages.dims, stages.depths, (FINE, COARSE), strict=True):
        pointwise = 2 * dim**2 + 2 * dim * int(dim * stages.mlp_ratio)
        # the depthwise convolution alone runs over hidden patches too
        block = 2 * seen * side**2 * pointwise + 2 * patches * side**2 * dim * KERNEL**2
        embed, fuse = seen * side**2 * before * dim, seen * side**2 * dim * width
        total += depth * block + 2 * (embed + fuse)
        before = (FINE // COARSE) ** 2 * dim
    return total + 2 * seen * before * width


def count_blocks(depth: int, *, width: int, mlp_ratio: float, tokens: int) -> int:
    """Operations of transformer blocks on `tokens` tokens: linear layers and attention's two products."""
    linear = 2 * tokens * width * width * 4 + 2 * tokens * width * int(width * mlp_ratio) * 2
    attention = 2 * tokens * tokens * width * 2
    return depth * (linear + attention)
