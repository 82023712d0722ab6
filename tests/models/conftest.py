"""Plain forward passes on state_dicts with the published names: whole maps, no modules."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(state: State, name: str, tokens: Tensor, eps: float) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(state: State, name: str, tokens: Tensor) -> Tensor:
    return tokens @ state[f"{name}.weight"].T + state[f"{name}.bias"]


TIMM = {"norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
MM = {"norm1": "ln1", "norm2": "ln2", "fc1": "ffn.layers.0.0", "fc2": "ffn.layers.1"}


def run_vit_block(
    state: State, name: str, tokens: Tensor, *, heads: int, names: Mapping[str, str] = TIMM
) -> Tensor:
    batch, length, width = tokens.shape
    qkv = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.{names['norm1']}", tokens, 1e-6))
    query, key, value = (
        part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.split(width, dim=-1)
    )
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
    mixed = (weights @ value).transpose(1, 2).reshape(batch, length, width)
    tokens = tokens + linear(state, f"{name}.attn.proj", mixed)
    normed = norm(state, f"{name}.{names['norm2']}", tokens, 1e-6)
    wide = F.gelu(linear(state, f"{name}.{names['fc1']}", normed))
    return tokens + linear(state, f"{name}.{names['fc2']}", wide)


def run_vit_blocks(
    state: State, name: str, tokens: Tensor, *, heads: int, names: Mapping[str, str] = TIMM
) -> Tensor:
    depth = 0
    while f"{name}.{depth}.{names['norm1']}.weight" in state:
        tokens = run_vit_block(state, f"{name}.{depth}", tokens, heads=heads, names=names)
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


# Whole published models: random tensors with their names and shapes, and what their code computes.

WIDTH, DEPTH, HEADS, PATCH, SIDE, GRID = 24, 2, 3, 4, 24, 6
DECODER_WIDTH, DECODER_HEADS = 16, 4


class Maker:
    """Random tensors by name; on the meta device, shapes alone."""

    def __init__(self, device: str = "cpu") -> None:
        self.state: dict[str, Tensor] = {}
        self.device = device
        self.rng = torch.Generator().manual_seed(7)

    def add(self, name: str, *shape: int, around: float = 0.0) -> None:
        if self.device == "meta":
            self.state[name] = torch.empty(shape, device="meta")
        else:
            self.state[name] = around + 0.3 * torch.randn(shape, generator=self.rng)

    def linear(self, name: str, width_in: int, width_out: int, *, bias: bool = True) -> None:
        self.add(f"{name}.weight", width_out, width_in)
        if bias:
            self.add(f"{name}.bias", width_out)

    def norm(self, name: str, width: int) -> None:
        self.add(f"{name}.weight", width, around=1.0)
        self.add(f"{name}.bias", width)

    def conv(self, name: str, dim_in: int, dim_out: int, side: int) -> None:
        self.add(f"{name}.weight", dim_out, dim_in, side, side)
        self.add(f"{name}.bias", dim_out)

    def blocks(self, name: str, depth: int, width: int, names: Mapping[str, str], ratio: int = 4) -> None:
        for number in range(depth):
            block = f"{name}.{number}"
            self.norm(f"{block}.{names['norm1']}", width)
            self.linear(f"{block}.attn.qkv", width, 3 * width)
            self.linear(f"{block}.attn.proj", width, width)
            self.norm(f"{block}.{names['norm2']}", width)
            self.linear(f"{block}.{names['fc1']}", width, ratio * width)
            self.linear(f"{block}.{names['fc2']}", ratio * width, width)

    def decoder(
        self, prefix: str, names: Mapping[str, str], *, final: str, sizes: "Sizes", depth: int
    ) -> None:
        width = sizes.decoder_width
        self.linear(f"{prefix}decoder_embed", sizes.width, width)
        self.add(f"{prefix}mask_token", 1, 1, width)
        self.add(f"{prefix}decoder_pos_embed", 1, sizes.grid**2 + sizes.prefix, width)
        self.blocks(f"{prefix}decoder_blocks", depth, width, names)
        self.norm(f"{prefix}{final}", width)
        self.linear(f"{prefix}decoder_pred", width, 3 * sizes.patch**2)

    def head(self, name: str, width_in: int, hidden: int, width_out: int) -> None:
        self.linear(f"{name}.fc0", width_in, hidden)
        self.norm(f"{name}.bn0", hidden)
        self.add(f"{name}.bn0.running_mean", hidden)
        self.add(f"{name}.bn0.running_var", hidden, around=3.0)
        self.state[f"{name}.bn0.num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=self.device)
        self.linear(f"{name}.fc1", hidden, width_out, bias=False)


class Sizes(NamedTuple):
    width: int = WIDTH
    depth: int = DEPTH
    patch: int = PATCH
    grid: int = GRID
    decoder_width: int = DECODER_WIDTH
    decoder_depth: int = 2
    prefix: int = 1
    hidden: int = 20
    out: int = 12


def make_mae(*, classes: int = 0) -> dict[str, Tensor]:
    """MAE pre-trained, or with `classes` fine-tuned. Source: facebookresearch/mae, names and shapes."""
    maker, sizes = Maker(), Sizes()
    maker.add("cls_token", 1, 1, WIDTH)
    maker.add("pos_embed", 1, GRID**2 + 1, WIDTH)
    maker.conv("patch_embed.proj", 3, WIDTH, PATCH)
    maker.blocks("blocks", DEPTH, WIDTH, TIMM)
    if classes:
        maker.norm("fc_norm", WIDTH)
        maker.linear("head", WIDTH, classes)
    else:
        maker.norm("norm", WIDTH)
        maker.decoder("", TIMM, final="decoder_norm", sizes=sizes, depth=2)
    return maker.state


def make_convmae(*, classes: int = 0) -> dict[str, Tensor]:
    """ConvMAE pre-trained, or with `classes` fine-tuned. Source: Alpha-VL/ConvMAE, names and shapes."""
    maker, (dim1, dim2) = Maker(), (8, 12)
    for stage, (dim_in, dim, side) in enumerate([(3, dim1, 1), (dim1, dim2, 2), (dim2, WIDTH, 2)], start=1):
        maker.conv(f"patch_embed{stage}.proj", dim_in, dim, side)
        maker.norm(f"patch_embed{stage}.norm", dim)
    maker.linear("patch_embed4", WIDTH, WIDTH)
    maker.add("pos_embed", 1, GRID**2, WIDTH)
    for stage, dim in ((1, dim1), (2, dim2)):
        for number in range(2):
            block = f"blocks{stage}.{number}"
            maker.norm(f"{block}.norm1", dim)
            maker.conv(f"{block}.conv1", dim, dim, 1)
            maker.conv(f"{block}.conv2", dim, dim, 1)
            maker.conv(f"{block}.attn", 1, dim, 5)
            maker.norm(f"{block}.norm2", dim)
            maker.conv(f"{block}.mlp.fc1", dim, 4 * dim, 1)
            maker.conv(f"{block}.mlp.fc2", 4 * dim, dim, 1)
    maker.blocks("blocks3", DEPTH, WIDTH, TIMM)
    if classes:
        maker.norm("fc_norm", WIDTH)
        maker.linear("head", WIDTH, classes)
    else:
        maker.conv("stage1_output_decode", dim1, WIDTH, 4)
        maker.conv("stage2_output_decode", dim2, WIDTH, 2)
        maker.norm("norm", WIDTH)
        maker.decoder("", TIMM, final="decoder_norm", sizes=Sizes(prefix=0), depth=2)
    return maker.state


def make_cmae(*, classes: int = 0, sizes: Sizes | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Official CMAE pre-trained, or with `classes` fine-tuned. Source: ZhichengHuang/CMAE, names, shapes."""
    sizes = sizes or Sizes(width=48)  # a feature decoder puts out the values of a patch: here also the width
    maker = Maker(device)
    for branch in ("backbone",) if classes else ("backbone", "target_backbone"):
        maker.add(f"{branch}.cls_token", 1, 1, sizes.width)
        maker.add(f"{branch}.pos_embed", 1, sizes.grid**2 + 1, sizes.width)
        maker.conv(f"{branch}.patch_embed.projection", 3, sizes.width, sizes.patch)
        maker.blocks(f"{branch}.layers", sizes.depth, sizes.width, MM)
    if classes:
        maker.norm("backbone.fc_norm", sizes.width)
        maker.linear("head.head", sizes.width, classes)
        return maker.state
    maker.norm("backbone.ln1", sizes.width)
    maker.decoder("pixel_decoder.", MM, final="ln1", sizes=sizes, depth=sizes.decoder_depth)
    maker.decoder("feature_decoder.", MM, final="ln1", sizes=sizes, depth=2)
    for name in ("projector", "target_projector"):
        maker.head(name, sizes.width, sizes.hidden, sizes.out)
    maker.head("head.predictor", sizes.out, sizes.hidden, sizes.out)
    return maker.state


def encode_vit(
    state: State,
    images: Tensor,
    hidden: Tensor,
    *,
    prefix: str = "",
    names: Mapping[str, str] = TIMM,
    heads: int = HEADS,
) -> Tensor:
    """Class token and kept patches before any norm."""
    conv, blocks = ("patch_embed.proj", "blocks") if names is TIMM else ("patch_embed.projection", "layers")
    patches = convolve(state, f"{prefix}{conv}", images, stride=PATCH).flatten(2).transpose(1, 2)
    positions = state[f"{prefix}pos_embed"]
    tokens = keep(patches + positions[:, 1:], hidden)
    cls = (state[f"{prefix}cls_token"] + positions[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls, tokens], dim=1)
    return run_vit_blocks(state, f"{prefix}{blocks}", tokens, heads=heads, names=names)


def decode(
    state: State,
    latents: Tensor,
    hidden: Tensor,
    *,
    prefix: str = "",
    names: Mapping[str, str] = TIMM,
    final: str = "decoder_norm",
    prefix_tokens: int = 1,
) -> Tensor:
    """A prediction for every patch."""
    visible = linear(state, f"{prefix}decoder_embed", latents)
    rows = []
    for row, mask in zip(visible, hidden, strict=True):
        patches = state[f"{prefix}mask_token"][0].repeat(len(mask), 1)
        patches[mask == 0] = row[prefix_tokens:]
        rows.append(torch.cat([row[:prefix_tokens], patches]))
    tokens = torch.stack(rows) + state[f"{prefix}decoder_pos_embed"]
    tokens = run_vit_blocks(state, f"{prefix}decoder_blocks", tokens, heads=DECODER_HEADS, names=names)
    return linear(state, f"{prefix}decoder_pred", norm(state, f"{prefix}{final}", tokens, 1e-6))[
        :, prefix_tokens:
    ]


def reconstruction_loss(images: Tensor, predicted: Tensor, hidden: Tensor) -> Tensor:
    """Mean over hidden patches of the squared error against patches normalised one by one."""
    total = torch.zeros(())
    for image, rows, mask in zip(images, predicted, hidden, strict=True):
        for number in mask.nonzero().flatten().tolist():
            top, left = number // GRID * PATCH, number % GRID * PATCH
            pixels = image[:, top : top + PATCH, left : left + PATCH].permute(1, 2, 0).flatten()
            normed = (pixels - pixels.mean()) / (pixels.var(unbiased=True) + 1e-6).sqrt()
            total = total + (rows[number] - normed).square().mean()
    return total / hidden.sum()


def mae_loss(state: State, images: Tensor, hidden: Tensor) -> Tensor:
    latents = norm(state, "norm", encode_vit(state, images, hidden), 1e-6)
    return reconstruction_loss(images, decode(state, latents, hidden), hidden)


def convmae_loss(state: State, images: Tensor, hidden: Tensor) -> Tensor:
    latents = encode_convmae(state, images, hidden, heads=HEADS)
    return reconstruction_loss(images, decode(state, latents, hidden, prefix_tokens=0), hidden)


def run_head(state: State, name: str, rows: Tensor) -> Tensor:
    wide = linear(state, f"{name}.fc0", rows)
    normed = F.batch_norm(
        wide, None, None, state[f"{name}.bn0.weight"], state[f"{name}.bn0.bias"], training=True, eps=1e-6
    )
    return normed.relu() @ state[f"{name}.fc1.weight"].T


def cmae_losses(
    state: State, online: Tensor, target: Tensor, hidden: Tensor, *, heads: int
) -> tuple[Tensor, Tensor]:
    """loss_rc and loss_ct of the official code."""
    latents = encode_vit(state, online, hidden, prefix="backbone.", names=MM, heads=heads)
    latents = norm(state, "backbone.ln1", latents, 1e-6)
    pixels, features = (
        decode(state, latents, hidden, prefix=prefix, names=MM, final="ln1")
        for prefix in ("pixel_decoder.", "feature_decoder.")
    )
    everything = torch.zeros_like(hidden)
    whole = encode_vit(state, target, everything, prefix="target_backbone.", names=MM, heads=heads)
    query = run_head(state, "head.predictor", run_head(state, "projector", features.mean(dim=1)))
    key = run_head(state, "target_projector", whole[:, 1:].mean(dim=1))
    score = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.07
    contrast = 2 * 0.07 * F.cross_entropy(score, torch.arange(len(score)))
    return reconstruction_loss(online, pixels, hidden), contrast


class Published(NamedTuple):
    """What a test needs of the published models."""

    make_mae: Callable[..., dict[str, Tensor]] = make_mae
    make_convmae: Callable[..., dict[str, Tensor]] = make_convmae
    make_cmae: Callable[..., dict[str, Tensor]] = make_cmae
    mae_loss: Callable[..., Tensor] = mae_loss
    convmae_loss: Callable[..., Tensor] = convmae_loss
    cmae_losses: Callable[..., tuple[Tensor, Tensor]] = cmae_losses
    encode_vit: Callable[..., Tensor] = encode_vit
    run_convmae_stages: Callable[..., tuple[Tensor, Tensor, Tensor]] = run_convmae_stages
    norm: Callable[..., Tensor] = norm
    linear: Callable[..., Tensor] = linear
    sizes: type[Sizes] = Sizes
    mm_names: Mapping[str, str] = MM


@pytest.fixture
def published() -> Published:
    return Published()
