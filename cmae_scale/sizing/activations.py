"""What a forward pass leaves in memory for the backward pass, in closed form.

Each term is a tensor that an operation of the model saves for its gradient, or that a name still holds,
counted once per storage. A test compares the sum with the storages that are alive after a forward pass. What
`model.skip_redundant` spares is not taken off: with it the sum is a bound, some percent too high.
"""

from typing import Literal, NamedTuple, TypeAlias

from cmae_scale.config.cmae import CmaeConfig, DecoderConfig, Remat
from cmae_scale.config.precision import NumberFormats
from cmae_scale.config.sizes import COARSE, FINE, ConvStages, count_prefix, read_size, read_stages
from cmae_scale.sizing.flops import count_kept

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


class ConvShape(NamedTuple):
    """A convolutional block on the kept sites of one image."""

    sites: int
    places: int  # of the map, where hidden patches are zeros
    dim: int
    hidden: int  # width of the MLP

    @property
    def tokens(self) -> int:
        """What stands one beside the other: sites."""
        return self.sites

    @property
    def numbers(self) -> int:
        """Of the residual stream."""
        return self.sites * self.dim


Shape: TypeAlias = BlockShape | ConvShape


class EncoderStage(NamedTuple):
    """Bytes per image that one stage of an encoder needs. A plain transformer has one stage."""

    name: str
    kept: int  # alive between forward and backward
    transient: int  # beside that, what its backward needs
    passing: int  # at the fullest moment of a forward pass that keeps nothing


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
    patches, values, prefix = grid**2, 3 * model.patch_size**2, count_prefix(model)
    kept = count_kept(grid, cell=cfg.mask.cell, ratio=cfg.mask.ratio)
    hidden = patches - kept
    encoder = sum(stage.kept for stage in plan_encoder(cfg, seen=kept, method=method))
    # the final norm's output is every decoder's input; autocast rounds it anew for each, else all share it
    narrowed = (kept + prefix) * size.embed_dim * compute

    def completion(decoder: DecoderConfig) -> int:
        shape = decoder_block(decoder, tokens=patches + prefix)
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


def plan_encoder(cfg: CmaeConfig, *, seen: int, method: Method) -> tuple[EncoderStage, ...]:
    """The stages, in forward order, of the encoder on `seen` patches of an image."""
    stages = read_stages(cfg.model)
    if stages is None:
        return (_plan_plain(cfg, seen=seen, method=method),)
    return _plan_hybrid(cfg, stages, seen=seen, method=method)


def _plan_plain(cfg: CmaeConfig, *, seen: int, method: Method) -> EncoderStage:
    """The one stage of a plain transformer."""
    shape = encoder_block(cfg, tokens=seen + count_prefix(cfg.model))
    kept = (
        seen * 3 * cfg.model.patch_size**2 * method.formats.compute_bytes  # the embedding's input
        + read_size(cfg.model).depth * count_block(shape, method=method)
        # the final norm's input and statistics
        + shape.numbers * method.formats.parameter_bytes
        + _statistics(shape.tokens)
    )
    transient, passing = count_transient(shape, method=method), count_passing(shape, formats=method.formats)
    return EncoderStage("encoder", kept, transient, passing)


def _plan_hybrid(
    cfg: CmaeConfig, stages: ConvStages, *, seen: int, method: Method
) -> tuple[EncoderStage, ...]:
    """The stages of a hybrid: fine sites, coarse sites, patches. What each makes is summed up at the end."""
    formats, patches = method.formats, (cfg.views.img_px // cfg.model.patch_size) ** 2
    numbers = seen * (FINE**2 + COARSE**2) * _INT64  # where the sites are: both kinds, from the start
    kept = numbers + seen * 3 * cfg.model.patch_size**2 * formats.compute_bytes  # the first embedding's input
    planned, held = [], 0
    for name, dim, depth, side in zip(("fine", "coarse"), *stages[:2], (FINE, COARSE), strict=True):
        shape = ConvShape(seen * side**2, patches * side**2, dim, int(dim * stages.mlp_ratio))
        kept += _count_embedding(shape, formats=formats) + depth * count_block(shape, method=method)
        # read by the next embedding and by the sum: autocast rounds it anew for each, else both share it
        kept += shape.numbers * formats.compute_bytes * (2 if formats.is_autocast else 1)
        planned.append(_plan_stage(f"encoder's {name} sites", shape, kept=kept, held=held, method=method))
        held += shape.numbers * formats.parameter_bytes
        kept = 0
    tokens = encoder_block(cfg, tokens=seen)
    kept = (
        _count_embedding(tokens, formats=formats)
        + tokens.numbers * formats.compute_bytes  # the input of the linear layer after the embedding
        + read_size(cfg.model).depth * count_block(tokens, method=method)
        # the final norm's input and statistics
        + tokens.numbers * formats.parameter_bytes
        + _statistics(tokens.tokens)
    )
    planned.append(_plan_stage("encoder's patches", tokens, kept=kept, held=held, method=method))
    return tuple(stage._replace(passing=stage.passing + numbers) for stage in planned)


def _plan_stage(name: str, shape: Shape, *, kept: int, held: int, method: Method) -> EncoderStage:
    """A stage of such blocks; `held` are bytes of what earlier ones made for the sum, or of its gradients."""
    return EncoderStage(
        name,
        kept,
        transient=held + count_transient(shape, method=method),
        passing=held + count_passing(shape, formats=method.formats),
    )


def _count_embedding(shape: Shape, *, formats: NumberFormats) -> int:
    """Between two stages: the input of the norm and its statistics, its output, which GELU reads."""
    return 2 * shape.numbers * formats.parameter_bytes + _statistics(shape.tokens)


def count_block(shape: Shape, *, method: Method) -> int:
    """Bytes per image that one block keeps, its input included and its output not."""
    match shape:
        case BlockShape():
            return _count_transformer_block(shape, method=method)
        case ConvShape():
            return _count_conv_block(shape, method=method)


def _count_conv_block(shape: ConvShape, *, method: Method) -> int:
    """Of a convolutional block."""
    compute = method.formats.compute_bytes
    numbers, hidden = shape.numbers * compute, shape.sites * shape.hidden * compute
    residual = shape.numbers * method.formats.parameter_bytes
    match method.remat:
        case "none":
            # inputs of both norms, their outputs; what is spread over a map, the map, what is collected from
            # the next one; both sides of GELU
            depthwise = 2 * numbers + shape.places * shape.dim * compute
            return 2 * residual + 2 * _statistics(shape.sites) + 2 * numbers + depthwise + 2 * hidden
        case "selective":
            # results of the pointwise convolutions, which are matrix products; the depthwise one is none
            return residual + 3 * numbers + hidden
        case "full":
            return residual


def _count_transformer_block(shape: BlockShape, *, method: Method) -> int:
    """Of a transformer block."""
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


def count_transient(shape: Shape, *, method: Method) -> int:
    """Bytes per image that a block's backward needs beside what it kept: what is recomputed, gradients."""
    whole = method._replace(remat="none")
    recomputed = 0
    if method.remat != "none":
        recomputed = count_block(shape, method=whole)
    if method.remat == "selective":
        recomputed -= count_block(shape, method=method) - shape.numbers * method.formats.parameter_bytes
    gradient = shape.numbers * method.formats.parameter_bytes
    return recomputed + 2 * gradient + shape.tokens * shape.hidden * method.formats.compute_bytes


def count_passing(shape: Shape, *, formats: NumberFormats) -> int:
    """Bytes per image at the fullest moment of a block that keeps nothing: both sides of its GELU, mostly."""
    compute, stream = formats.compute_bytes, formats.parameter_bytes
    inner = 2 * shape.tokens * shape.hidden * compute
    match shape:
        case BlockShape():
            return 2 * shape.numbers * stream + shape.numbers * compute + inner
        case ConvShape():
            # the inputs of block and MLP, the norm's output; what was collected has a name still
            return 3 * shape.numbers * stream + shape.numbers * compute + inner


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
