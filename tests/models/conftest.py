"""Plain forward passes on state_dicts with the published names: whole maps, no modules."""

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(state: State, name: str, tokens: Tensor, eps: float) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: State, name: str, tokens: Tensor) -> Tensor:
    return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def run_vit_block(state: State, name: str, tokens: Tensor, *, heads: int) -> Tensor:
    batch, length, width = tokens.shape
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", tokens, 1e-6))
    query, key, value = (
        part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=-1)
    )
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
    tokens = tokens + linear(state, f"{name}.attn.proj", mixed)
    wide = F.gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", tokens, 1e-6)))
    return tokens + linear(state, f"{name}.mlp.fc2", wide)


def run_vit_blocks(state: State, name: str, tokens: Tensor, *, heads: int) -> Tensor:
    depth = 0
    while f"{name}.{depth}.norm1.weight" in state:
        tokens = run_vit_block(state, f"{name}.{depth}", tokens, heads=heads)
        depth += 1
    return tokens


def convolve(state: State, name: str, maps: Tensor, **how: int) -> Tensor:
    return F.conv2d(maps, state[f"{name}.weight"], state[f"{name}.bias"], **how)


def norm_map(state: State, name: str, maps: Tensor) -> Tensor:
    return norm(state, name, maps.permute(0, 2, 3, 1), 1e-5).permute(0, 3, 1, 2)


def run_conv_block(state: State, name: str, maps: Tensor, seen: Tensor) -> Tensor:
    inner = convolve(state, f"{name}.conv1", norm_map(state, f"{name}.norm1", maps)) * seen
    inner = convolve(state, f"{name}.attn", inner, padding=2, groups=maps.shape[1])
    maps = maps + convolve(state, f"{name}.conv2", inner)
    wide = F.gelu(convolve(state, f"{name}.mlp.fc1", norm_map(state, f"{name}.norm2", maps)))
    return maps + convolve(state, f"{name}.mlp.fc2", wide)


def run_convmae_stages(
    state: State, images: Tensor, hidden: Tensor, *, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole maps of the two stages and the kept tokens of the third; `hidden` is 1 where a patch is hidden.

    Every site of every map is computed, hidden or not, and tokens are dropped before the third stage.
    """
    batch, patches = hidden.shape
    grid = round(patches**0.5)
    stride = images.shape[-1] // grid // 4
    maps, stages = images, []
    for stage, (step, side) in enumerate([(stride, 4), (2, 2)], start=1):
        maps = convolve(state, f"patch_embed{stage}.proj", maps, stride=step)
        maps = F.gelu(norm_map(state, f"patch_embed{stage}.norm", maps))
        seen = 1 - hidden.view(batch, 1, grid, grid)
        seen = seen.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
        depth = 0
        while f"blocks{stage}.{depth}.norm1.weight" in state:
            maps = run_conv_block(state, f"blocks{stage}.{depth}", maps, seen)
            depth += 1
        stages.append(maps)
    maps = F.gelu(norm_map(state, "patch_embed3.norm", convolve(state, "patch_embed3.proj", maps, stride=2)))
    tokens = linear(state, "patch_embed4", maps.flatten(2).transpose(1, 2)) + state["pos_embed"]
    tokens = run_vit_blocks(state, "blocks3", keep(tokens, hidden), heads=heads)
    return stages[0], stages[1], tokens


def keep(tokens: Tensor, hidden: Tensor) -> Tensor:
    """The tokens of visible patches, row-major; as many in every image."""
    return torch.stack([row[seen] for row, seen in zip(tokens, hidden == 0, strict=True)])


def encode_convmae(state: State, images: Tensor, hidden: Tensor, *, heads: int) -> Tensor:
    fine, coarse, tokens = run_convmae_stages(state, images, hidden, heads=heads)
    for name, maps, side in (("stage1_output_decode", fine, 4), ("stage2_output_decode", coarse, 2)):
        fused = convolve(state, name, maps, stride=side).flatten(2).transpose(1, 2)
        tokens = tokens + keep(fused, hidden)
    return norm(state, "norm", tokens, 1e-6) if "norm.weight" in state else tokens


@pytest.fixture
def plain_convmae() -> Callable[..., Tensor]:
    """`plain_convmae(state, images, hidden, heads=...)`: the encoder's tokens, from whole maps."""
    return encode_convmae


@pytest.fixture
def plain_stages() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The same up to the three stages' outputs."""
    return run_convmae_stages
