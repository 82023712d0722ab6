"""From the visible patches to predictions for all: the pixel decoder and the feature decoder."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmae_scale.config.cmae import DecoderConfig
from cmae_scale.layers.blocks import NORM_EPS, ExactLinear, build_blocks
from cmae_scale.layers.tokens import (
    TokenMask,
    pack_tokens,
    scatter_tokens,
    sincos_positions,
    take_tokens,
)
from cmae_scale.models.encoder import BlockRunner, run_block


class CompletedTokens(NamedTuple):
    """The encoder's class token, if it has one, and one token for every patch, in row-major order.

    Of the hidden patches alone, in the mask's order, is `last` where that was asked for.
    """

    last: Float[Tensor, "batch tokens embed"]  # after all blocks
    early: (
        Float[Tensor, "batch tokens embed"] | None
    )  # after the first `early_depth` blocks, if there are any


class MaskedDecoder(nn.Module):
    """A token for every patch, from the visible patches alone: what both decoders do first.

    With `skip_redundant`, the first block's norm and query, key, value of a hidden patch are computed once
    for all images: they depend on its position alone.

    Source: MAE (arXiv:2111.06377) section 3 -- mask tokens enter here, never the encoder.
    """

    pos_embed: Tensor

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        width_in: int,
        grid: int,
        num_prefix_tokens: int = 1,
        early_depth: int = 0,
        skip_redundant: bool = False,
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.early_depth = early_depth
        self.skip_redundant = skip_redundant
        self.narrow = nn.Linear(width_in, cfg.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, cfg.embed_dim))
        self.register_buffer("pos_embed", sincos_positions(grid, cfg.embed_dim, cls=bool(num_prefix_tokens)))
        self.blocks = build_blocks(
            cfg.depth, embed_dim=cfg.embed_dim, num_heads=cfg.num_heads, mlp_ratio=cfg.mlp_ratio
        )
        self.run_block: BlockRunner = run_block

    def forward(
        self,
        latents: Float[Tensor, "batch visible width_in"],
        mask: TokenMask,
        *,
        hidden_only: bool = False,
    ) -> CompletedTokens:
        """Completed tokens from the encoder's output: class token if it has one, then the kept patches.

        With `hidden_only`, `last` are the hidden patches' tokens in the mask's order.
        """
        early, queries = None, mask.hidden + self.num_prefix_tokens
        blocks: list[Callable[..., Tensor]] = list(self.blocks)
        if self.skip_redundant:
            tokens, places = self._pack(latents, mask)
            blocks[0] = partial(blocks[0], places=places)
        else:
            tokens = self._complete(latents, mask)
        is_cut = hidden_only and self.skip_redundant and self.early_depth != len(blocks)
        if is_cut:
            blocks[-1] = partial(blocks[-1], queries=queries)
        for depth, block in enumerate(blocks, start=1):
            tokens = self.run_block(block, tokens)
            if depth == self.early_depth:
                early = tokens
        return CompletedTokens(take_tokens(tokens, queries) if hidden_only and not is_cut else tokens, early)

    def _complete(
        self, latents: Float[Tensor, "batch visible width_in"], mask: TokenMask
    ) -> Float[Tensor, "batch tokens embed"]:
        """Every token with its position, as the first block gets it."""
        visible, prefix = self.narrow(latents), self.num_prefix_tokens
        patches = scatter_tokens(visible[:, prefix:], mask, fill=self.mask_token)
        tokens = torch.cat([visible[:, :prefix], patches], dim=1) + self.pos_embed
        return tokens.to(self.mask_token.dtype)

    def _pack(
        self, latents: Float[Tensor, "batch visible width_in"], mask: TokenMask
    ) -> tuple[Float[Tensor, "rows embed"], Int[Tensor, "batch visible"]]:
        """The same tokens with those of hidden patches once for all images, and the visible ones' places."""
        prefix = torch.arange(self.num_prefix_tokens, device=latents.device).expand(len(latents), -1)
        places = torch.cat([prefix, mask.kept + self.num_prefix_tokens], dim=1)
        visible = self.narrow(latents) + self.pos_embed[0, places]
        blanks = self.mask_token + self.pos_embed
        dtype = self.mask_token.dtype
        return pack_tokens(visible.to(dtype), blanks[0].to(dtype)), places


class PixelPrediction(NamedTuple):
    """Pixels of the hidden patches in the mask's order, and the tokens that a feature head may share."""

    pixels: Float[Tensor, "batch hidden values"]
    early: Float[Tensor, "batch tokens embed"] | None


class PixelDecoder(nn.Module):
    """Predict the pixels of the hidden patches.

    Source: MAE section 3, models_mae.py: 8 blocks 512 wide, 16 heads for every size of the encoder.
    Differs: the last norm and linear run on hidden patches only, because no loss asks for the others; with
    `skip_redundant` so does all of the last block but its keys and values.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        width_in: int,
        grid: int,
        values: int,
        num_prefix_tokens: int = 1,
        early_depth: int = 0,
        skip_redundant: bool = False,
    ) -> None:
        super().__init__()
        self.completion = MaskedDecoder(
            cfg,
            width_in=width_in,
            grid=grid,
            num_prefix_tokens=num_prefix_tokens,
            early_depth=early_depth,
            skip_redundant=skip_redundant,
        )
        self.norm = nn.LayerNorm(cfg.embed_dim, eps=NORM_EPS)
        self.predict = nn.Linear(cfg.embed_dim, values)

    def forward(self, latents: Float[Tensor, "batch visible width_in"], mask: TokenMask) -> PixelPrediction:
        """A vector in `patchify`'s order for each hidden patch."""
        hidden, early = self.completion(latents, mask, hidden_only=True)
        return PixelPrediction(self.predict(self.norm(hidden)), early)


class FeatureHead(nn.Module):
    """One vector per image from its completed tokens.

    Under autocast it stays in its parameters' dtype, as the heads that it feeds.

    Source: paper equation 4: the mean over all patches, hidden and visible, of the predicted features.
    Differs: the linear comes after the mean; the two commute, and this costs 1/patches of it.
    """

    def __init__(self, width_in: int, width_out: int, *, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = nn.LayerNorm(width_in, eps=NORM_EPS)
        self.predict = ExactLinear(width_in, width_out)

    def forward(self, tokens: Float[Tensor, "batch tokens embed"]) -> Float[Tensor, "batch width_out"]:
        """The image's feature; the class token takes no part."""
        with torch.autocast(tokens.device.type, enabled=False):
            features: Tensor = self.predict(self.norm(tokens[:, self.num_prefix_tokens :]).mean(dim=1))
        return features


class FeatureDecoder(nn.Module):
    """Complete the online features before they are compared: without it, they lack what the mask hid.

    Source: paper 3.3 and table 4c: 2 blocks of its own; 8 blocks collapse to a trivial solution.
    Differs: its output is as wide as the encoder, so that both projectors have one shape at every size. The
    official code has 768, the values of a patch, which is ViT-B's width.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        width_in: int,
        grid: int,
        num_prefix_tokens: int = 1,
        skip_redundant: bool = False,
    ) -> None:
        super().__init__()
        self.completion = MaskedDecoder(
            cfg,
            width_in=width_in,
            grid=grid,
            num_prefix_tokens=num_prefix_tokens,
            skip_redundant=skip_redundant,
        )
        self.head = FeatureHead(cfg.embed_dim, width_in, num_prefix_tokens=num_prefix_tokens)

    def forward(
        self, latents: Float[Tensor, "batch visible width_in"], mask: TokenMask
    ) -> Float[Tensor, "batch width_in"]:
        """The image's feature, completed from its visible patches."""
        feature: Tensor = self.head(self.completion(latents, mask).last)
        return feature
