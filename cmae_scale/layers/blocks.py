"""The transformer blocks of encoder and decoders, and a linear layer that is kept in fp32."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from cmae_scale.layers.attention import attend_explicitly
from cmae_scale.layers.tokens import take_tokens, unpack_tokens

NORM_EPS = 1e-6  # of every LayerNorm. Source: timm VisionTransformer, facebookresearch/mae models_mae.py


class Block(TimmBlock):  # type: ignore[misc]
    """timm's block, which can also leave out what its caller has no use for.

    Parameters and their names are timm's. What it gives for the tokens that are asked for equals timm's, but
    for rounding.
    """

    def forward(
        self,
        tokens: Float[Tensor, "... embed"],
        *,
        places: Int[Tensor, "batch visible"] | None = None,
        queries: Int[Tensor, "batch queries"] | None = None,
        mean_from: int | None = None,
    ) -> Float[Tensor, "batch ... embed"]:
        """The tokens [batch, tokens, embed] after attention and MLP.

        With `places`, `tokens` are rows as `pack_tokens` makes them: query, key and value of a token that all
        images share are computed once. With `queries`, only those tokens are put out, with `mean_from` only
        the mean [batch, embed] of all tokens from this one on: the others are keys and values and no more.
        """
        if places is None and queries is None and mean_from is None:
            whole: Tensor = super().forward(tokens)
            return whole

        def select(everywhere: Tensor) -> Tensor:
            if queries is not None:
                return take_tokens(everywhere, queries)
            return everywhere[:, mean_from:]

        qkv = self.attn.qkv(self.norm1(tokens))
        if places is not None:
            tokens, qkv = unpack_tokens(tokens, places), unpack_tokens(qkv, places)
        query, key, value = qkv.chunk(3, dim=-1)
        attended = self.attn.proj(attend(self.attn, select(query), key, value))
        stream = select(tokens) + self.drop_path1(self.ls1(attended))
        if mean_from is None:
            mixed: Tensor = stream + self.drop_path2(self.ls2(self.mlp(self.norm2(stream))))
            return mixed
        assert isinstance(self.drop_path2, nn.Identity), "of a mean no branch can be dropped"
        # the last linear layer commutes with the mean
        hidden = self.mlp.act(self.mlp.fc1(self.norm2(stream))).mean(dim=1)
        mean: Tensor = stream.mean(dim=1) + self.ls2(self.mlp.fc2(hidden))
        return mean


def attend(
    attention: Attention,
    query: Float[Tensor, "batch queries embed"],
    key: Float[Tensor, "batch tokens embed"],
    value: Float[Tensor, "batch tokens embed"],
) -> Float[Tensor, "batch queries embed"]:
    """What timm's `attention` does between its two linear layers, also for fewer queries than keys."""
    heads = [
        x.view(*x.shape[:2], attention.num_heads, attention.head_dim).transpose(1, 2)
        for x in (query, key, value)
    ]
    run: Any = F.scaled_dot_product_attention if attention.fused_attn else attend_explicitly
    attended: Tensor = run(*heads).transpose(1, 2).flatten(2)
    return attended


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
