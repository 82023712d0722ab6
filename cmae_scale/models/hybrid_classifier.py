"""The hybrid encoder as a classifier: fine-tuned without masks and without the sum of stages."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.layers.blocks import NORM_EPS
from cmae_scale.layers.sites import place_sites
from cmae_scale.models.hybrid import HybridTrunk
from cmae_scale.sizing.sizes import COARSE, FINE, ConvStages, EncoderSize

PRETRAINING_ONLY = re.compile(r"(stage[12]_output_decode|norm)\.(weight|bias)")
HEAD_STD = 2e-5  # Source: Alpha-VL/ConvMAE main_finetune.py, as facebookresearch/mae


class HybridClassifier(HybridTrunk):
    """Mean of the third stage's tokens, a new norm, a linear layer; positions are trained too.

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
    ) -> None:
        super().__init__(
            size, stages, patch_size=patch_size, grid=grid, mlp_ratio=mlp_ratio, drop_path=drop_path
        )
        self.num_features, self.num_classes = size.embed_dim, num_classes
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2, size.embed_dim))
        self.fc_norm = nn.LayerNorm(size.embed_dim, eps=NORM_EPS)
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
        """Tokens of the last stage, without any norm."""
        return self.forward_stages(images, None).tokens

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


def finetuning_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pre-trained hybrid encoder's weights that a HybridClassifier starts from: load with strict=False.

    What is missing then are the new `fc_norm` and `head`; the sum of stages and its norm are left behind.
    """
    return {name: tensor for name, tensor in state.items() if not PRETRAINING_ONLY.fullmatch(name)}
