"""The transformer blocks of encoder and decoders, and a linear layer that is kept in fp32."""

from collections.abc import Sequence
from functools import partial

from timm.models.vision_transformer import Block
from torch import nn

NORM_EPS = 1e-6  # of every LayerNorm. Source: timm VisionTransformer, facebookresearch/mae models_mae.py


def build_blocks(
    depth: int,
    *,
    embed_dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path: Sequence[float] | None = None,
) -> nn.Sequential:
    """`depth` pre-norm blocks of timm without dropout, named 0, 1, ..., with a rate of drop path for each.

    Source: MAE models_mae.py: biases everywhere, no layer scale, drop path 0 in pre-training.
    """
    norm = partial(nn.LayerNorm, eps=NORM_EPS)
    return nn.Sequential(
        *(
            Block(embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=rate)
            for rate in drop_path or [0.0] * depth
        )
    )


class ExactLinear(nn.Linear):
    """nn.Linear under a class of its own, whose weights DeepSpeed sends between ranks unrounded.

    With torch_autocast, ZeRO-3 gathers the weights of plain nn.Linear in bf16, and which copy a step sees
    then depends on what was gathered before. That makes no difference where autocast rounds anyway; layers
    that run outside of autocast use this one.
    """
