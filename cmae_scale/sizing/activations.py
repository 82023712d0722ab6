"""What a forward pass leaves in memory for the backward pass, in closed form.

Each term is a tensor that an operation of the model saves for its gradient, or that a name still holds,
counted once per storage. A test compares the sum with the storages that are alive after a forward pass.
"""

from typing import Literal, NamedTuple

from cmae_scale.core.precision import NumberFormats
from cmae_scale.core.settings import CmaeConfig, DecoderConfig, Remat
from cmae_scale.sizing.flops import count_kept
from cmae_scale.sizing.sizes import read_size

# fused: softmax never stored, its log-sum is (flash, efficient, cuDNN); explicit: matmul, softmax, matmul as
# in timm; math: torch's own composition, which works in fp32 whatever comes in
Kernel = Literal["fused", "explicit", "math"]

_FP32 = 4
_INT64 = 8


class BlockShape(NamedTuple):
    """A transformer block on the tokens of one image."""

    tokens: int
    width: int
    heads: int
    hidden: int  # width of the MLP

    @property
    def numbers(self) -> int:
        """Of the residual stream."""
        return self.tokens * self.width


class Activations(NamedTuple):
    """Bytes per image that are alive between forward and backward, by part."""

    online_encoder: int
    pixel_decoder: int
    feature_decoder: int
    heads: int  # projector, predictor and what the contrast loss keeps beside its logits


class Method(NamedTuple):
    """How the passes are run: what decides, with the model's sizes, which tensors are kept."""

    formats: NumberFormats
    kernel: Kernel
    remat: Remat


def count_activations(cfg: CmaeConfig, *, method: Method) -> Activations:
    """The parts' kept bytes for one image."""
    size, model, formats = read_size(cfg.model), cfg.model, method.formats
    compute, stream = formats.compute_bytes, formats.parameter_bytes
    grid = cfg.views.img_px // model.patch_size
    patches, values = grid**2, 3 * model.patch_size**2
    kept = count_kept(grid, cell=cfg.mask.cell, ratio=cfg.mask.ratio)
    hidden = patches - kept
    latents = (kept + 1) * size.embed_dim
    # embedding's input, blocks, the final norm's input and statistics; its output is every decoder's input
    encoder = (
        kept * values * compute
        + size.depth * count_block(encoder_block(cfg, tokens=kept + 1), method=method)
        + latents * stream
        + _statistics(kept + 1)
    )
    # autocast rounds the latents anew for each decoder; without it all share one tensor
    narrowed = latents * compute

    def completion(decoder: DecoderConfig) -> int:
        shape = decoder_block(decoder, tokens=patches + 1)
        return decoder.depth * count_block(shape, method=method) + shape.numbers * stream

    pixel = cfg.model.pixel_decoder
    predicted = hidden * values
    pixels = (
        narrowed
        + completion(pixel)
        + hidden * pixel.embed_dim * (stream + compute)  # the last norm's input and output
        + _statistics(hidden)
        # prediction and truth as the loss compares them, and the storage of the mean, which torch first
        # filled with all squares and then shrank to one number without giving the memory back
        + predicted * _FP32 * 3
        + (predicted * compute if compute < _FP32 else 0)  # the prediction before it was widened
        + patches * _INT64  # the mask
    )
    if not cfg.has_contrast:
        return Activations(encoder, pixels, 0, 0)
    feature, features = model.feature_decoder, 0
    if feature.depth:
        features = _statistics(patches) + feature.embed_dim * stream
    if feature.depth and not feature.shared:
        features += completion(feature) + (narrowed if formats.is_autocast else 0)
    return Activations(encoder, pixels, features, heads=_count_heads(cfg, width=size.embed_dim))


def count_block(shape: BlockShape, *, method: Method) -> int:
    """Bytes per image that one block keeps, its input included and its output not."""
    compute, stream = method.formats.compute_bytes, method.formats.parameter_bytes
    numbers, hidden = shape.numbers * compute, shape.tokens * shape.hidden * compute
    wide = _FP32 if method.kernel == "math" else compute  # of attention's own products
    scores = shape.heads * shape.tokens * (_FP32 if method.kernel == "fused" else shape.tokens * wide)
    residual = shape.numbers * stream
    match method.remat:
        case "none":
            # inputs of both norms, their outputs, attention's output; query, key, value; both sides of GELU
            attention = 3 * shape.numbers * wide + scores + numbers
            return 2 * residual + 2 * _statistics(shape.tokens) + 2 * numbers + attention + 2 * hidden
        case "selective":
            # results of matrix products: query, key and value, attention, projection, both of the MLP
            return residual + 5 * numbers + shape.numbers * wide + scores + hidden
        case "full":
            return residual


def count_transient(shape: BlockShape, *, method: Method) -> int:
    """Bytes per image that a block's backward needs beside what it kept: what is recomputed, gradients."""
    whole = method._replace(remat="none")
    recomputed = 0
    if method.remat != "none":
        recomputed = count_block(shape, method=whole)
    if method.remat == "selective":
        recomputed -= count_block(shape, method=method) - shape.numbers * method.formats.parameter_bytes
    gradient = shape.numbers * method.formats.parameter_bytes
    return recomputed + 2 * gradient + shape.tokens * shape.hidden * method.formats.compute_bytes


def count_passing(shape: BlockShape, *, formats: NumberFormats) -> int:
    """Bytes per image at the fullest moment of a block that keeps nothing: both sides of its GELU, mostly."""
    hidden = shape.tokens * shape.hidden
    return 2 * shape.numbers * formats.parameter_bytes + (shape.numbers + 2 * hidden) * formats.compute_bytes


def encoder_block(cfg: CmaeConfig, *, tokens: int) -> BlockShape:
    """The encoder's block on so many tokens."""
    size = read_size(cfg.model)
    return BlockShape(tokens, size.embed_dim, size.num_heads, int(size.embed_dim * cfg.model.mlp_ratio))


def decoder_block(decoder: DecoderConfig, *, tokens: int) -> BlockShape:
    """A decoder's block on so many tokens."""
    return BlockShape(
        tokens, decoder.embed_dim, decoder.num_heads, int(decoder.embed_dim * decoder.mlp_ratio)
    )


def _count_heads(cfg: CmaeConfig, *, width: int) -> int:
    """Projector and predictor: input, the norm's two differences or its input, ReLU's output; fp32."""
    hidden, out = cfg.heads.hidden_dim, cfg.heads.out_dim
    per_head = (3 if cfg.heads.norm == "sync_batch" else 2) * hidden
    return _FP32 * (width + 2 * per_head + 4 * out)


def _statistics(tokens: int) -> int:
    return 2 * tokens * _FP32  # mean and deviation of each token
