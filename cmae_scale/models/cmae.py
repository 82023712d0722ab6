"""The whole model: what the online branch does, what the target branch does."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.cmae import CmaeConfig, MaskConfig, NetworkConfig
from cmae_scale.layers.tokens import TokenMask, mask_from_noise
from cmae_scale.models.build import (
    OnInit,
    build_encoder,
    init_follower_,
    init_head_,
    init_transformer_,
    keep_whole,
)
from cmae_scale.models.decoder import FeatureDecoder, FeatureHead, MaskedDecoder, PixelDecoder
from cmae_scale.models.encoder import BlockRunner, ImageEncoder, run_block
from cmae_scale.models.heads import Predictor, Projector


class CMAEOutput(NamedTuple):
    """What the losses compare; None where the call, or a plain MAE, does not ask for it."""

    pixels: Float[Tensor, "batch hidden values"] | None  # of the hidden patches, in the mask's order
    query: Float[Tensor, "batch dim"] | None  # online prediction
    key: Float[Tensor, "batch dim"] | None  # target projection, without gradient
    mask: TokenMask | None  # of the online view


class ParameterPair(NamedTuple):
    """A target parameter, its full name, and the online parameter that it follows."""

    name: str
    online: nn.Parameter
    target: nn.Parameter


class CMAE(nn.Module):
    """Contrastive masked autoencoder; with `loss.weight` 0 a plain masked autoencoder.

    The online branch sees the kept patches of one view, predicts the pixels of the others and a feature of
    the whole image. The target branch sees a second view; it gets no gradient, the engine lets its parameters
    follow the online ones.

    `mask` is None for a model that is never run, only asked for its tensors' names and shapes.

    Source: CMAE (arXiv:2207.13532) section 3, figure 1.
    """

    def __init__(self, cfg: NetworkConfig, *, mask: MaskConfig | None) -> None:
        super().__init__()
        model, feature = cfg.model, cfg.model.feature_decoder
        self.mask_config, self.target_config = mask, cfg.target
        self.online_encoder = build_encoder(model, img_px=cfg.views.img_px)
        self.grid, width = self.online_encoder.grid, self.online_encoder.embed_dim
        prefix = self.online_encoder.num_prefix_tokens
        self.pixel_decoder = PixelDecoder(
            model.pixel_decoder,
            width_in=width,
            grid=self.grid,
            values=3 * model.patch_size**2,
            num_prefix_tokens=prefix,
            early_depth=feature.depth if cfg.has_contrast and feature.shared else 0,
            skip_redundant=model.skip_redundant,
        )
        self.feature_decoder: FeatureDecoder | FeatureHead | None = None
        self.projector: Projector | None = None
        self.predictor: Predictor | None = None
        self.target_encoder: ImageEncoder | None = None
        self.target_projector: Projector | None = None
        if cfg.has_contrast:
            if feature.depth and feature.shared:
                self.feature_decoder = FeatureHead(feature.embed_dim, width, num_prefix_tokens=prefix)
            elif feature.depth:
                self.feature_decoder = FeatureDecoder(
                    feature,
                    width_in=width,
                    grid=self.grid,
                    num_prefix_tokens=prefix,
                    skip_redundant=model.skip_redundant,
                )
            self.projector = Projector(width, cfg.heads)
            self.predictor = Predictor(cfg.heads)
            self.target_encoder = build_encoder(
                model,
                img_px=cfg.views.img_px,
                final_norm=cfg.target.final_norm,
                pools=model.skip_redundant and cfg.target.pool == "mean",
            )
            self.target_projector = Projector(width, cfg.heads)
            self.target_encoder.requires_grad_(False)
            self.target_projector.requires_grad_(False)

    def forward(
        self,
        online: Float[Tensor, "batch 3 side side"] | None,
        target: Float[Tensor, "batch 3 side side"] | None,
        *,
        noise: Float[Tensor, "batch cells"] | None = None,
        target_noise: Float[Tensor, "batch cells"] | None = None,
    ) -> CMAEOutput:
        """Predictions and queries of the online view, keys of the target view; a view may be left out.

        `noise` fixes the online mask: the cells with the lowest values are kept. `target_noise` does the same
        where `target.mask_ratio` hides patches of the target too. Without them the masks are random.
        """
        key = None
        if target is not None and self.target_encoder is not None:
            key = self._key(target, target_noise)
        if online is None:
            return CMAEOutput(pixels=None, query=None, key=key, mask=None)
        assert self.mask_config is not None
        mask = self.draw_mask(online, noise, ratio=self.mask_config.ratio)
        latents = self.online_encoder(online, mask)
        pixels, early = self.pixel_decoder(latents, mask)
        query = None
        if self.projector is not None and self.predictor is not None:
            query = self.predictor(self.projector(self._feature(latents, mask, early)))
        return CMAEOutput(pixels, query, key, mask)

    def _feature(
        self,
        latents: Float[Tensor, "batch visible embed"],
        mask: TokenMask,
        early: Float[Tensor, "batch tokens dim"] | None,
    ) -> Float[Tensor, "batch embed"]:
        """One vector per online view. Source: paper table 4c for the three ways."""
        match self.feature_decoder:
            case FeatureDecoder() as decoder:
                feature: Tensor = decoder(latents, mask)
            case FeatureHead() as head:
                feature = head(early)
            case None:
                feature = self.online_encoder.pool(latents)
        return feature

    @torch.no_grad()
    def _key(
        self, images: Float[Tensor, "batch 3 side side"], noise: Float[Tensor, "batch cells"] | None
    ) -> Float[Tensor, "batch dim"]:
        """Projection of the target view. Source: paper equation 2; the mean leaves the class token out."""
        assert self.target_encoder is not None
        assert self.target_projector is not None
        ratio = self.target_config.mask_ratio
        mask = self.draw_mask(images, noise, ratio=ratio) if ratio else None
        feature = self.target_encoder(images, mask)
        if not self.target_encoder.pools:
            latents, is_cls = feature, self.target_config.pool == "cls"
            feature = latents[:, 0] if is_cls else self.target_encoder.pool(latents)
        key: Tensor = self.target_projector(feature)
        return key

    def count_cells(self) -> int:
        """Cells of an image that are kept or hidden as a whole."""
        assert self.mask_config is not None
        return int((self.grid // self.mask_config.cell) ** 2)

    def draw_mask(
        self,
        images: Float[Tensor, "batch 3 side side"],
        noise: Float[Tensor, "batch cells"] | None,
        *,
        ratio: float,
    ) -> TokenMask:
        """The patches of each image that are kept, `ratio` of the cells being hidden; see `forward`."""
        assert self.mask_config is not None
        if noise is None:
            noise = torch.rand(len(images), self.count_cells(), device=images.device)
        return mask_from_noise(noise, grid=self.grid, cell=self.mask_config.cell, ratio=ratio)

    def target_pairs(self) -> list[ParameterPair]:
        """Every target parameter with the online one of the same name.

        The online side has more, because the target has no final norm: so names, not places, decide.
        """
        pairs = []
        for branch, online, target in (
            ("target_encoder", self.online_encoder, self.target_encoder),
            ("target_projector", self.projector, self.target_projector),
        ):
            if online is not None and target is not None:
                followed = dict(online.named_parameters())
                pairs += [
                    ParameterPair(f"{branch}.{name}", followed[name], parameter)
                    for name, parameter in target.named_parameters()
                ]
        return pairs

    @torch.no_grad()
    def init_(self, on_init: OnInit = keep_whole) -> None:
        """Give every parameter its starting value; the target starts as a copy of the online branch.

        `on_init` gets each module in turn when its own parameters have their values. If it splits them over
        ranks, it is the caller's to copy online to target, shard by shard.
        """
        for transformer in (self.online_encoder, self.pixel_decoder, self.feature_decoder):
            if transformer is not None:
                init_transformer_(transformer, on_init)
        for head in (self.projector, self.predictor):
            if head is not None:
                init_head_(head, on_init)
        for follower in (self.target_encoder, self.target_projector):
            if follower is not None:
                init_follower_(follower, on_init)
        for pair in self.target_pairs():
            pair.target.copy_(pair.online)

    def set_remat_(self, checkpoint_block: BlockRunner | None) -> None:
        """Run every block that gets gradients as `checkpoint_block(block, tokens)`; None undoes it."""
        for trained in (self.online_encoder, self.pixel_decoder, self.feature_decoder):
            for module in trained.modules() if trained is not None else ():
                if isinstance(module, ImageEncoder | MaskedDecoder):
                    module.run_block = checkpoint_block or run_block


def build_cmae(cfg: CmaeConfig, *, on_init: OnInit = keep_whole) -> CMAE:
    """The model of a run file, on the CPU. Its weights follow from `cfg.seed` alone, so all ranks agree.

    It is laid out on the meta device and gets its values module by module; `on_init` may put each module away
    before the next takes memory (see `CMAE.init_`). Inside of `torch.device("meta")` it stays without values.
    """
    with torch.device("meta"):
        model = CMAE(cfg, mask=cfg.mask)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)
        model.init_(on_init)
    return model
