"""The hybrid encoder on whole images: features and classifiers, without masks."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmae_scale.config.sizes import COARSE, FINE, ConvStages, EncoderSize
from cmae_scale.layers.blocks import NORM_EPS
from cmae_scale.models.encoder import run_block
from cmae_scale.models.hybrid import HybridTrunk, place_sites

HEAD_STD = 2e-5  # Source: Alpha-VL/ConvMAE main_finetune.py, as facebookresearch/mae


class HybridClassifier(HybridTrunk):
    """A linear layer, if there are classes, on the mean over patches; positions are trained too.

    With `fc_norm` that mean is of the last stage's tokens and a new norm follows it: fine-tuning. Without,
    it is of the tokens as pre-training left them, the normed sum of the stages: frozen features.
    The names and methods that timm's optimizers and its users expect of a VisionTransformer are here.

    Source: Alpha-VL/ConvMAE models_convvit.py with global_pool.
    """

    def __init__(
        self,
        size: EncoderSize,
        stages: ConvStages,
        *,
        patch_size: int,
        grid: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        fc_norm: bool = True,
    ) -> None:
        super().__init__(
            size,
            stages,
            patch_size=patch_size,
            grid=grid,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
            fuses=not fc_norm,
        )
        self.num_features, self.num_classes, self.has_fc_norm = size.embed_dim, num_classes, fc_norm
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, size.embed_dim))
        self.norm = nn.Identity() if fc_norm else nn.LayerNorm(size.embed_dim, eps=NORM_EPS)
        self.fc_norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS) if fc_norm else nn.Identity()
        self.head = nn.Linear(size.embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_head_()

    @torch.no_grad()
    def init_head_(self) -> None:
        """The classifier's starting values: logits near zero."""
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
            nn.init.zeros_(self.head.bias)

    def forward_features(
        self, images: Float[Tensor, "batch 3 side side"]
    ) -> Float[Tensor, "batch patches embed"]:
        """Tokens of the last stage without any norm, or without `fc_norm` the normed sum of all stages."""
        outputs = self.forward_stages(images, None)
        tokens: Tensor = self.norm(outputs.tokens if self.has_fc_norm else self.fuse(outputs))
        return tokens

    def forward_head(
        self, tokens: Float[Tensor, "batch patches embed"], *, pre_logits: bool = False
    ) -> Float[Tensor, "batch out"]:
        """Logits; with `pre_logits` (or without classes) the pooled features."""
        pooled: Tensor = self.fc_norm(tokens.mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch out"]:
        """Logits of the classes."""
        return self.forward_head(self.forward_features(images))

    def forward_maps(
        self, images: Float[Tensor, "batch 3 side side"]
    ) -> tuple[
        Float[Tensor, "batch dim1 fine fine"],
        Float[Tensor, "batch dim2 coarse coarse"],
        Float[Tensor, "batch embed grid grid"],
    ]:
        """The stages' maps at strides of a quarter, a half and the whole of a patch, for dense tasks."""
        outputs = self.forward_stages(images, None)
        everywhere = torch.arange(self.grid**2, device=images.device).expand(len(images), -1)
        fine, coarse, tokens = (
            place_sites(everywhere, grid=self.grid, side=side).spread(sites)
            for sites, side in zip(outputs, (FINE, COARSE, 1), strict=True)
        )
        return fine, coarse, tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of blocks, of all stages, and compute the rest again in backward."""
        self.run_block = partial(checkpoint, use_reentrant=False) if enable else run_block

    def no_weight_decay(self) -> set[str]:
        """Parameters that are exempt beside norms and biases. Source: ConvMAE."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping for layer-wise learning rates: both convolutional stages belong to the stem.

        Source: Alpha-VL/ConvMAE util/lr_decay.py.
        """
        del coarse  # one block is the only unit
        stem = r"^pos_embed|^patch_embed|^blocks[12]"
        return {"stem": stem, "blocks": r"^blocks3\.(\d+)"}  # fc_norm and head match nothing: last, scale 1
