"""What an encoder is, and the plain one: the vision transformer."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.sizes import EncoderSize
from cmae_scale.layers.blocks import NORM_EPS, build_blocks
from cmae_scale.layers.tokens import PatchEmbed, TokenMask, patchify, sincos_positions, take_tokens

BlockCall: TypeAlias = Callable[[Tensor], Tensor]  # a block, or one with its other arguments bound
BlockRunner: TypeAlias = Callable[[BlockCall, Tensor], Tensor]


def run_block(block: BlockCall, tokens: Float[Tensor, "*tokens embed"]) -> Tensor:
    """The block's output, activations kept for backward: how a model runs unless told to rematerialise."""
    return block(tokens)


class ImageEncoder(nn.Module):
    """What both branches ask of an encoder; `Encoder` and `hybrid.HybridEncoder` are the two that exist."""

    embed_dim: int  # width of the tokens
    grid: int  # patches along a side of the image
    patch_size: int  # px
    num_prefix_tokens: int  # tokens before the patches': 1 with a class token, else 0
    pools: bool  # whether it puts out the mean of its patches' tokens, not the tokens
    run_block: BlockRunner  # how its blocks are run

    def forward(
        self, images: Float[Tensor, "batch channels side side"], mask: TokenMask | None
    ) -> Float[Tensor, "batch *tokens embed"]:
        """Prefix tokens and kept patches (all of them without a mask), in the mask's order, normed.

        If it `pools`, what `pool` makes of them. Where no norm comes in between, the last linear layers then
        run after the mean: the same but for rounding, for fewer operations.
        """
        raise NotImplementedError

    def pool(self, tokens: Float[Tensor, "batch tokens embed"]) -> Float[Tensor, "batch embed"]:
        """Mean of the patches' tokens, the prefix left out. Source: CMAE equation 2, official cmae.py."""
        return tokens[:, self.num_prefix_tokens :].mean(dim=1)


class Encoder(ImageEncoder):
    """timm's VisionTransformer, run on the kept patches alone.

    It is put together from timm's blocks under timm's names: its state_dict loads into
    timm.models.VisionTransformer and back. Positions are fixed, so they are a buffer: in the state_dict, not
    in the optimizer, and in fp32 whatever the engine makes of the parameters. Nothing is spent on hidden
    patches, not even their embedding.

    Source: MAE (arXiv:2111.06377) section 3; no dropout and no drop path in pre-training.
    """

    pos_embed: Tensor

    def __init__(
        self,
        size: EncoderSize,
        *,
        patch_size: int,
        grid: int,
        mlp_ratio: float = 4.0,
        final_norm: bool = True,
        pools: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.grid, self.patch_size = size.embed_dim, grid, patch_size
        self.num_prefix_tokens, self.pools = 1, pools
        self.patch_embed = PatchEmbed(patch_size, size.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.register_buffer("pos_embed", sincos_positions(grid, size.embed_dim, cls=True))
        self.blocks = build_blocks(
            size.depth, embed_dim=size.embed_dim, num_heads=size.num_heads, mlp_ratio=mlp_ratio
        )
        self.norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS) if final_norm else nn.Identity()
        self.run_block: BlockRunner = run_block

    def forward(
        self, images: Float[Tensor, "batch channels side side"], mask: TokenMask | None
    ) -> Float[Tensor, "batch *tokens embed"]:
        """Class token and kept patches (all of them without a mask), in the mask's order, after the norm.

        The residual stream has the parameters' dtype, so it is fp32 under autocast.
        """
        patches = patchify(images, self.patch_size)
        cls_position, positions = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if mask is not None:
            patches = take_tokens(patches, mask.kept)
            positions = positions[0, mask.kept]
        embedded = self.patch_embed(patches) + positions
        cls = (self.cls_token + cls_position).expand(images.shape[0], -1, -1)
        tokens = torch.cat([cls, embedded], dim=1).to(self.cls_token.dtype)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = self.run_block(block, tokens)
        if self.pools and isinstance(self.norm, nn.Identity):
            return self.run_block(partial(last, mean_from=self.num_prefix_tokens), tokens)
        normed: Tensor = self.norm(self.run_block(last, tokens))
        return self.pool(normed) if self.pools else normed
