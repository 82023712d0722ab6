"""What a pretrained encoder's weights become: pooled features, or a classifier to train.

Plain transformers are timm's own. A hybrid is ours, with the members that timm's models have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from cmae_scale.config.cmae import Pool
from cmae_scale.config.sizes import EncoderSize, read_size, read_stages
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.build import build_encoder, init_transformer_
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.hybrid import ENDS
from cmae_scale.models.hybrid_classifier import HybridClassifier
from cmae_scale.models.pretrained import PretrainedEncoder
from cmae_scale.models.read import read_sizes
from cmae_scale.models.weights import CONFIG_FILE
from cmae_scale.sizing.flops import count_blocks, count_encoder

Network: TypeAlias = VisionTransformer | HybridClassifier

# of sizes that somebody has changed, down to torch
_BUILD_ERRORS = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
POOLS: Mapping[Pool, str] = {"mean": "avg", "cls": "token"}  # in timm's words


def build_network(
    encoder: PretrainedEncoder,
    *,
    img_px: int | None = None,
    pool: Pool = "mean",
    classes: int = 0,
    has_new_norm: bool = False,
    drop_path: float = 0.0,
) -> Network:
    """The encoder's weights as a network; positions are resized to `img_px` (None: the encoder's own).

    Without `classes` it gives pooled features. `has_new_norm` leaves the trained norm out, of a hybrid also
    the sum of its stages, and puts a fresh norm after the mean. Source: MAE models_vit.py, ConvMAE
    models_convvit.py, official fine-tuning. The head has its library's starting values until it is set.
    """
    shape = _Shape(img_px, pool, classes, has_new_norm or encoder.has_own_pool_norm, drop_path)
    try:
        network = _build_hybrid(encoder, shape) if encoder.is_hybrid else _build_vit(encoder, shape)
    except _BUILD_ERRORS:
        raise ConfigError(f"{encoder.place}: the sizes in its {CONFIG_FILE} make no network") from None
    if encoder.state:
        _load_(network, encoder, has_new_norm=has_new_norm)
    return network


def draw_weights(encoder: PretrainedEncoder, *, seed: int) -> PretrainedEncoder:
    """The same architecture with weights drawn from `seed`, as pre-training starts."""
    if encoder.is_hybrid:
        sizes = read_sizes(encoder.args)
        fresh: nn.Module = build_encoder(sizes, img_px=int(encoder.args["img_size"]))
    else:
        vit = build_network(replace(encoder, state={}))
        assert isinstance(vit, VisionTransformer)
        fresh = Encoder(
            EncoderSize(vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads),
            patch_size=vit.patch_embed.patch_size[0],
            grid=vit.patch_embed.grid_size[0],
            mlp_ratio=_mlp_ratio(vit),
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        init_transformer_(fresh)
    return replace(encoder, place=f"{encoder.place} (random weights)", state=fresh.state_dict())


def list_blocks(network: Network) -> tuple[str, Sequence[Any]]:
    """timm's blocks of the transformer, and the name of their list."""
    name = "blocks" if isinstance(network, VisionTransformer) else "blocks3"
    return name, list(getattr(network, name))


def count_tokens(network: Network) -> int:
    """Tokens of an image in the transformer's blocks."""
    if isinstance(network, VisionTransformer):
        tokens: int = network.patch_embed.num_patches + network.num_prefix_tokens
        return tokens
    sites: int = network.grid**2
    return sites


def count_training_flops(encoder: PretrainedEncoder, network: Network, *, trained_blocks: int | None) -> int:
    """Operations of an image's training step: backward costs twice the forward pass of what is trained.

    `network` is built from `encoder`. `trained_blocks` are the last of the transformer; None is all of it.
    """
    _, blocks = list_blocks(network)
    block = count_blocks(
        1, width=network.embed_dim, mlp_ratio=_mlp_ratio(network), tokens=count_tokens(network)
    )
    if isinstance(network, VisionTransformer):
        side: int = network.patch_embed.patch_size[0]
        patches: int = network.patch_embed.num_patches
        forward: int = 2 * patches * 3 * side**2 * network.embed_dim + len(blocks) * block
    else:
        patches = network.grid**2
        forward = count_encoder(read_sizes(encoder.args), seen=patches, patches=patches)
    return 3 * forward if trained_blocks is None else forward + 2 * trained_blocks * block


def _mlp_ratio(network: Network) -> float:
    _, blocks = list_blocks(network)
    ratio: float = blocks[0].mlp.fc1.out_features / network.embed_dim
    return ratio


class _Shape(NamedTuple):
    """What is built on an encoder, whatever its kind."""

    img_px: int | None  # None: the encoder's own
    pool: Pool
    classes: int
    has_pool_norm: bool
    drop_path: float


def _build_vit(encoder: PretrainedEncoder, shape: _Shape) -> VisionTransformer:
    args = dict(encoder.args)
    if shape.img_px is not None:
        args["img_size"] = shape.img_px
    if shape.has_pool_norm:
        args.pop("final_norm", None)  # False would leave timm without either norm
    args.update(
        num_classes=shape.classes,
        global_pool=POOLS[shape.pool],
        fc_norm=shape.has_pool_norm,
        drop_path_rate=shape.drop_path,
    )
    try:
        model = timm.create_model(encoder.architecture, pretrained=False, **args)
    except _BUILD_ERRORS as error:
        told = str(error).partition("\n")[0]
        raise ConfigError(f"{encoder.place}: timm cannot build it for {shape.img_px} px ({told})") from None
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{encoder.place} is a {type(model).__name__}: give a vision transformer of timm")
    return model


def _build_hybrid(encoder: PretrainedEncoder, shape: _Shape) -> HybridClassifier:
    if shape.pool == "cls":
        raise ConfigError(
            f'{encoder.place} is a hybrid, which has no class token: write "pool": "mean" in the task'
        )
    sizes = read_sizes(encoder.args)
    side = shape.img_px or int(encoder.args["img_size"])
    if side % sizes.patch_size:
        raise ConfigError(f"{encoder.place} has patches of {sizes.patch_size} px: {side} px is no multiple")
    stages = read_stages(sizes)
    assert stages is not None
    return HybridClassifier(
        read_size(sizes),
        stages,
        patch_size=sizes.patch_size,
        grid=side // sizes.patch_size,
        mlp_ratio=sizes.mlp_ratio,
        num_classes=shape.classes,
        drop_path=shape.drop_path,
        fc_norm=shape.has_pool_norm,
    )


def _load_(network: Network, encoder: PretrainedEncoder, *, has_new_norm: bool) -> None:
    dropped: tuple[str, ...] = ("head.",)
    if has_new_norm:
        dropped += ("norm.", "fc_norm.")
    if isinstance(network, HybridClassifier) and network.has_fc_norm:
        dropped += tuple(f"{name}." for name in ENDS)
    state = {name: value for name, value in encoder.state.items() if not name.startswith(dropped)}
    positions = state.get("pos_embed")
    if positions is not None and network.pos_embed is not None:
        state["pos_embed"] = _resize(positions, network)
    try:
        missing, unexpected = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"{encoder.place}: weights do not fit ({str(error).splitlines()[-1].strip()})"
        ) from None
    missing = [name for name in missing if not name.startswith(("head.", "fc_norm."))]
    if missing or unexpected:
        raise ConfigError(
            f"{encoder.place}: its weights are of another network than its {CONFIG_FILE} describes "
            f"(missing {missing[:3]}, unknown {list(unexpected)[:3]})"
        )


def _resize(positions: Tensor, network: Network) -> Tensor:
    """Positions for the network's grid. Source: timm, MAE util/pos_embed.py (bicubic)."""
    if positions.shape == network.pos_embed.shape:
        return positions
    prefix, grid = 0, [getattr(network, "grid", 0)] * 2
    if isinstance(network, VisionTransformer):
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        grid = list(network.patch_embed.grid_size)
    resized: Tensor = resample_abs_pos_embed(positions.float(), new_size=grid, num_prefix_tokens=prefix)
    return resized
