"""The hybrid encoder of CMAE*: two stages of masked convolutions, then a vision transformer."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import DropPath
from torch import Tensor, nn

from cmae_scale.config.sizes import COARSE, FINE, KERNEL, ConvStages, EncoderSize
from cmae_scale.layers.blocks import NORM_EPS, build_blocks
from cmae_scale.layers.tokens import PatchProjection, TokenMask, patchify, sincos_positions
from cmae_scale.models.encoder import BlockRunner, ImageEncoder, run_block


def number_sites(grid: int, side: int, *, device: torch.device) -> Int[Tensor, "patches sites"]:
    """Row-major numbers, in a map of grid * side sites along a side, of the sites of each patch.

    `side` is a power of two.
    """
    levels = side.bit_length() - 1
    split = (grid, *[2] * levels)
    numbers = torch.arange((grid * side) ** 2, device=device).view(*split, *split)
    order = [axis for level in range(levels + 1) for axis in (level, levels + 1 + level)]
    return numbers.permute(order).reshape(grid * grid, side * side)


class KeptSites(NamedTuple):
    """Where the sites of the kept patches are in the maps of a batch."""

    rows: Int[Tensor, "taken"]  # of the batch's maps laid out site after site, image after image
    batch: int
    map_side: int  # sites along a side of the map

    def take(self, sites: Float[Tensor, "batch all dim"]) -> Float[Tensor, "batch kept dim"]:
        """The kept ones of sites in row-major order."""
        return sites.flatten(0, 1).index_select(0, self.rows).view(self.batch, -1, sites.shape[2])

    def spread(self, sites: Float[Tensor, "batch kept dim"]) -> Float[Tensor, "batch dim side side"]:
        """A map, channels last in memory, with zeros where nothing is kept."""
        blank = sites.new_zeros(self.batch * self.map_side**2, sites.shape[2])
        rows = blank.index_copy(0, self.rows, sites.flatten(0, 1))
        return rows.view(self.batch, self.map_side, self.map_side, -1).permute(0, 3, 1, 2)

    def collect(self, maps: Float[Tensor, "batch dim side side"]) -> Float[Tensor, "batch kept dim"]:
        """The kept sites of a map."""
        return self.take(maps.permute(0, 2, 3, 1).flatten(1, 2))


def place_sites(kept: Int[Tensor, "batch patches"], *, grid: int, side: int) -> KeptSites:
    """The sites of the patches `kept` in maps of `side` x `side` sites a patch."""
    numbers = number_sites(grid, side, device=kept.device)[kept].flatten(1)
    first = torch.arange(kept.shape[0], device=kept.device)[:, None] * (grid * side) ** 2
    return KeptSites((numbers + first).flatten(), kept.shape[0], grid * side)


class SiteProjection(nn.Conv2d):
    """A convolution whose kernel is as large as its stride, on sites: one matrix product.

    `side` 1 is a pointwise convolution; a larger one merges side x side neighbours into one site. It has
    Conv2d's parameters, so that a state_dict is that of the published code.
    """

    def __init__(self, dim_in: int, dim_out: int, *, side: int = 1) -> None:
        super().__init__(dim_in, dim_out, kernel_size=side, stride=side)
        self.side = side

    def forward(self, sites: Float[Tensor, "batch sites dim_in"]) -> Float[Tensor, "batch merged dim_out"]:
        """Sites in this module's order in, one for each side x side of them out."""
        weight = self.weight.flatten(2)
        if self.side > 1:
            weight = weight[:, :, number_sites(1, self.side, device=weight.device)[0]]
        merged = sites.reshape(sites.shape[0], -1, self.side**2 * sites.shape[2])
        return F.linear(merged, weight.transpose(1, 2).flatten(1), self.bias)


# what follows the last block in pre-training, and what a fine-tuned hybrid no longer has
ENDS = ("norm", "stage1_output_decode", "stage2_output_decode")


class StemProjection(PatchProjection):
    """The first convolution, on image tiles; its starting values are torch's own, unlike a ViT's."""


class MergeProjection(SiteProjection):
    """The convolution that makes patches of sites; it starts as a ViT's patch embedding does."""


class StageEmbed(nn.Module):
    """Convolution, norm and GELU: from pixels, or from the sites of one stage, to those of the next."""

    def __init__(self, proj: StemProjection | SiteProjection) -> None:
        super().__init__()
        self.proj = proj
        self.norm = nn.LayerNorm(proj.out_channels)  # eps 1e-5, torch's. Source: ConvMAE
        self.act = nn.GELU()

    def forward(self, sites: Float[Tensor, "batch sites dim_in"]) -> Float[Tensor, "batch merged dim"]:
        """Sites of the new stage, in the parameters' dtype: fp32 under autocast."""
        embedded: Tensor = self.act(self.norm(self.proj(sites).to(self.proj.weight.dtype)))
        return embedded


class ConvMlp(nn.Module):
    """Two pointwise convolutions around a GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = SiteProjection(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = SiteProjection(hidden_dim, dim)

    def forward(self, sites: Float[Tensor, "batch sites dim"]) -> Float[Tensor, "batch sites dim"]:
        """Each site by itself."""
        mixed: Tensor = self.fc2(self.act(self.fc1(sites)))
        return mixed


class ConvBlock(nn.Module):
    """A transformer block with a depthwise convolution in the place of attention.

    The convolution finds zeros where patches are hidden, so nothing leaks from them. All else works on each
    site alone, and is done for the kept ones only: exactly what the whole map would give there.

    Source: ConvMAE (arXiv:2205.03892) section 3.2; Alpha-VL/ConvMAE multiplies by the mask at this place.
    """

    def __init__(self, dim: int, *, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.conv1 = SiteProjection(dim, dim)
        self.attn = nn.Conv2d(dim, dim, KERNEL, padding=KERNEL // 2, groups=dim)
        self.conv2 = SiteProjection(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, sites: Float[Tensor, "batch sites dim"], places: KeptSites
    ) -> Float[Tensor, "batch sites dim"]:
        """The kept sites after a look at their kept neighbours."""
        around = places.collect(self.attn(places.spread(self.conv1(self.norm1(sites)))))
        sites = sites + self.drop_path(self.conv2(around))
        mixed: Tensor = sites + self.drop_path(self.mlp(self.norm2(sites)))
        return mixed


class StageOutputs(NamedTuple):
    """Kept sites after each stage, the tokens before any norm."""

    fine: Float[Tensor, "batch fine dim1"]
    coarse: Float[Tensor, "batch coarse dim2"]
    tokens: Float[Tensor, "batch kept embed"]


class HybridTrunk(nn.Module):
    """The three stages, and with `fuses` their sum, for pre-training and what follows. ConvMAE's names.

    A subclass brings `pos_embed`, fixed or trained.
    """

    pos_embed: Tensor

    def __init__(
        self,
        size: EncoderSize,
        stages: ConvStages,
        *,
        patch_size: int,
        grid: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        fuses: bool,
    ) -> None:
        super().__init__()
        self.embed_dim, self.grid, self.patch_size = size.embed_dim, grid, patch_size
        self.num_prefix_tokens = 0
        (dim1, dim2), (depth1, depth2) = stages.dims, stages.depths
        rates = torch.linspace(0, drop_path, depth1 + depth2 + size.depth, device="cpu").tolist()
        block = partial(ConvBlock, mlp_ratio=stages.mlp_ratio)
        self.patch_embed1 = StageEmbed(StemProjection(patch_size // FINE, dim1))
        self.blocks1 = nn.ModuleList(block(dim1, drop_path=rate) for rate in rates[:depth1])
        self.patch_embed2 = StageEmbed(SiteProjection(dim1, dim2, side=FINE // COARSE))
        self.blocks2 = nn.ModuleList(block(dim2, drop_path=rate) for rate in rates[depth1 : depth1 + depth2])
        self.patch_embed3 = StageEmbed(MergeProjection(dim2, size.embed_dim, side=COARSE))
        self.patch_embed4 = nn.Linear(size.embed_dim, size.embed_dim)
        self.blocks3 = build_blocks(
            size.depth,
            embed_dim=size.embed_dim,
            num_heads=size.num_heads,
            mlp_ratio=mlp_ratio,
            drop_path=rates[depth1 + depth2 :],
        )
        if fuses:
            self.stage1_output_decode = SiteProjection(dim1, size.embed_dim, side=FINE)
            self.stage2_output_decode = SiteProjection(dim2, size.embed_dim, side=COARSE)
        self.run_block: BlockRunner = run_block

    def forward_stages(
        self, images: Float[Tensor, "batch 3 side side"], mask: TokenMask | None, *, pools: bool = False
    ) -> StageOutputs:
        """What each stage makes of the kept patches, all of them without a mask; with `pools` their mean."""
        if mask is None:
            kept = torch.arange(self.grid**2, device=images.device).expand(images.shape[0], -1)
        else:
            kept = mask.kept
        fine_places = place_sites(kept, grid=self.grid, side=FINE)
        coarse_places = place_sites(kept, grid=self.grid, side=COARSE)
        fine = self.patch_embed1(fine_places.take(patchify(images, self.patch_size // FINE)))
        for block in self.blocks1:
            fine = self.run_block(partial(block, places=fine_places), fine)
        coarse = self.patch_embed2(fine)
        for block in self.blocks2:
            coarse = self.run_block(partial(block, places=coarse_places), coarse)
        positions = self.pos_embed if mask is None else self.pos_embed[0, kept]
        tokens = (self.patch_embed4(self.patch_embed3(coarse)) + positions).to(self.patch_embed4.weight.dtype)
        *blocks, last = self.blocks3
        for block in blocks:
            tokens = self.run_block(block, tokens)
        if pools:
            fine, coarse = (x.view(*kept.shape, -1, x.shape[2]).mean(dim=1) for x in (fine, coarse))
            return StageOutputs(fine, coarse, self.run_block(partial(last, mean_from=0), tokens)[:, None])
        return StageOutputs(fine, coarse, self.run_block(last, tokens))

    def fuse(self, outputs: StageOutputs) -> Float[Tensor, "batch kept embed"]:
        """The sum of the stages, brought to the size of the last."""
        fine, coarse, tokens = outputs
        fused: Tensor = tokens + self.stage1_output_decode(fine) + self.stage2_output_decode(coarse)
        return fused


class HybridEncoder(HybridTrunk, ImageEncoder):
    """ConvMAE's encoder: its tokens are the sum of all three stages. No class token.

    Nothing is spent on hidden patches but the depthwise convolutions. Its state_dict is the encoder's part of
    Alpha-VL/ConvMAE's.

    Source: ConvMAE section 3.3 for the masks, which are those of the patches in every stage, and for the sum.
    """

    def __init__(
        self,
        size: EncoderSize,
        stages: ConvStages,
        *,
        patch_size: int,
        grid: int,
        mlp_ratio: float = 4.0,
        final_norm: bool = True,
        pools: bool = False,
    ) -> None:
        super().__init__(size, stages, patch_size=patch_size, grid=grid, mlp_ratio=mlp_ratio, fuses=True)
        self.pools = pools
        self.register_buffer("pos_embed", sincos_positions(grid, size.embed_dim, cls=False))
        self.norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS) if final_norm else nn.Identity()

    def forward(
        self, images: Float[Tensor, "batch 3 side side"], mask: TokenMask | None
    ) -> Float[Tensor, "batch *kept embed"]:
        """Kept patches (all of them without a mask), in the mask's order, after the norm."""
        is_mean = self.pools and isinstance(self.norm, nn.Identity)
        normed: Tensor = self.norm(self.fuse(self.forward_stages(images, mask, pools=is_mean)))
        return self.pool(normed) if self.pools else normed
