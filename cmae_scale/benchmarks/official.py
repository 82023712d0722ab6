"""A training step the official code's way, on our model's weights: same mathematics, nothing left out.

All patches are embedded and then gathered, mask tokens are concatenated and put in order, every token is
predicted, attention writes its scores down, the optimizer is torch's default and the target follows parameter
by parameter. What our step leaves out or joins is what the two differ by.

Source: official cmae_vit.py, nonlinear_neck.py, cmae_head.py and momentum_update_hook.py, and MAE's
models_mae.py for what they inherit; written anew.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.layers.tokens import TokenMask
from cmae_scale.models.cmae import CMAE, ParameterPair
from cmae_scale.models.decoder import FeatureDecoder, MaskedDecoder
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.heads import Head


def official_loss(
    model: CMAE, online: Tensor, target: Tensor, *, noise: Tensor, cfg: CmaeConfig
) -> Float[Tensor, ""]:
    """Pixel loss plus InfoNCE of a plain CMAE with a ViT, its attention explicit and one rank."""
    encoder, follower, feature = model.online_encoder, model.target_encoder, model.feature_decoder
    assert isinstance(encoder, Encoder)
    assert isinstance(follower, Encoder)
    assert isinstance(feature, FeatureDecoder)
    assert model.projector is not None
    assert model.predictor is not None
    assert model.target_projector is not None
    mask = model.draw_mask(online, noise, ratio=cfg.mask.ratio)
    order = torch.cat([mask.kept, mask.hidden], dim=1).argsort(dim=1)
    patches = _embed(encoder, online)
    latents = encoder.norm(encoder.blocks(_with_cls(encoder, _gather(patches, mask.kept))))
    decoder = model.pixel_decoder
    pixels = decoder.predict(decoder.norm(_complete(decoder.completion, latents, order)))[:, 1:]
    completed = _complete(feature.completion, latents, order)
    features = feature.head.predict(feature.head.norm(completed))[:, 1:].mean(dim=1)
    query = _project(model.predictor, _project(model.projector, features))
    with torch.no_grad():
        tokens = follower.blocks(_with_cls(follower, _embed(follower, target)))
        key = _project(model.target_projector, tokens[:, 1:].mean(dim=1))
    pixel = _pixel_loss(pixels, online, mask, patch=encoder.patch_size)
    logits = F.normalize(query.float(), dim=1) @ F.normalize(key.float(), dim=1).T / cfg.loss.temperature
    contrast = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))
    return pixel + cfg.loss.weight * 2 * cfg.loss.temperature * contrast


@torch.no_grad()
def official_follow_(pairs: Sequence[ParameterPair], momentum: float) -> None:
    """The moving average, one parameter after the other."""
    for _, online, target in pairs:
        target.data = target.data * momentum + online.data * (1 - momentum)


def _embed(encoder: Encoder, images: Tensor) -> Tensor:
    """Every patch, by the convolution, with its position."""
    projection: nn.Conv2d = encoder.patch_embed.proj
    patches = F.conv2d(images, projection.weight, projection.bias, stride=encoder.patch_size)
    return patches.flatten(2).transpose(1, 2) + encoder.pos_embed[:, 1:]


def _with_cls(encoder: Encoder, patches: Tensor) -> Tensor:
    cls = encoder.cls_token + encoder.pos_embed[:, :1]
    return torch.cat([cls.expand(len(patches), -1, -1), patches], dim=1)


def _gather(tokens: Tensor, index: Tensor) -> Tensor:
    return torch.gather(tokens, dim=1, index=index.unsqueeze(-1).repeat(1, 1, tokens.shape[-1]))


def _complete(decoder: MaskedDecoder, latents: Tensor, order: Tensor) -> Tensor:
    visible = decoder.narrow(latents)
    blanks = decoder.mask_token.repeat(len(visible), order.shape[1] + 1 - visible.shape[1], 1)
    patches = _gather(torch.cat([visible[:, 1:], blanks], dim=1), order)
    tokens: Tensor = decoder.blocks(torch.cat([visible[:, :1], patches], dim=1) + decoder.pos_embed)
    return tokens


def _project(head: Head, features: Tensor) -> Tensor:
    assert isinstance(head.norm, nn.BatchNorm1d)
    normed = nn.BatchNorm1d.forward(head.norm, head.fc1(features))
    projected: Tensor = head.fc2(F.relu(normed))
    return projected


def _pixel_loss(pixels: Tensor, images: Tensor, mask: TokenMask, *, patch: int) -> Tensor:
    """Of all patches, then weighted by which are hidden."""
    tiles = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [batch, 3, rows, columns, patch, patch]
    wanted = tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    wanted = (wanted - wanted.mean(dim=-1, keepdim=True)) / (wanted.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    error = (pixels.float() - wanted).square().mean(dim=-1)
    hidden = torch.zeros_like(error).scatter(1, mask.hidden, 1.0)
    return (error * hidden).sum() / hidden.sum()
