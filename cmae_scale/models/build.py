"""The encoder that a run file asks for, and the starting values of every part."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from cmae_scale.config.cmae import ModelConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.layers.tokens import PatchProjection
from cmae_scale.models.decoder import MaskedDecoder
from cmae_scale.models.encoder import Encoder, ImageEncoder
from cmae_scale.models.hybrid import HybridEncoder, MergeProjection, StemProjection


def build_encoder(
    model: ModelConfig, *, img_px: int, final_norm: bool = True, pools: bool = False
) -> ImageEncoder:
    """The plain transformer or the hybrid that `model` asks for, with torch's own starting values."""
    size, stages, grid = read_size(model), read_stages(model), img_px // model.patch_size
    if stages is None:
        return Encoder(
            size,
            patch_size=model.patch_size,
            grid=grid,
            mlp_ratio=model.mlp_ratio,
            final_norm=final_norm,
            pools=pools,
        )
    return HybridEncoder(
        size,
        stages,
        patch_size=model.patch_size,
        grid=grid,
        mlp_ratio=model.mlp_ratio,
        final_norm=final_norm,
        pools=pools,
    )


TOKEN_STD = 0.02  # of class and mask tokens. Source: facebookresearch/mae models_mae.py


OnInit: TypeAlias = Callable[[nn.Module], None]  # gets each module once its own parameters have values


def keep_whole(module: nn.Module) -> None:
    """The plain way to on_init: nothing happens."""


def fill_(module: nn.Module) -> None:
    """Give what `module` itself holds on meta memory to live in, on torch's default device."""
    module._apply(  # type: ignore[no-untyped-call]
        lambda value: torch.empty_like(value, device=torch.get_default_device()) if value.is_meta else value,
        recurse=False,
    )


@torch.no_grad()
def init_transformer_(model: nn.Module, on_init: OnInit = keep_whole) -> None:
    """Give every parameter of an encoder or a decoder its starting value.

    Source: facebookresearch/mae models_mae.py, as official cmae_vit.py: Xavier for every Linear (query, key
    and value together as one matrix) and for the patch embedding as a matrix, whose bias stays torch's. Of
    a hybrid encoder's convolutions only the last embedding is such a matrix, the others stay torch's.
    Source: Alpha-VL/ConvMAE models_convmae.py.
    """
    for module in model.modules():
        fill_(module)
        match module:
            case StemProjection():
                module.reset_parameters()
            case PatchProjection():
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight.flatten(1))
            case MergeProjection():
                module.reset_parameters()
                nn.init.xavier_uniform_(module.weight.flatten(1))
            case nn.Conv2d():
                module.reset_parameters()
            case nn.Linear():
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            case nn.LayerNorm():
                module.reset_parameters()
            case Encoder():
                nn.init.normal_(module.cls_token, std=TOKEN_STD)
            case MaskedDecoder():
                nn.init.normal_(module.mask_token, std=TOKEN_STD)
        on_init(module)


@torch.no_grad()
def init_head_(head: nn.Module, on_init: OnInit = keep_whole) -> None:
    """Give every parameter of a projector or predictor torch's own starting value.

    Source: official heads call no initialiser (kaiming-uniform Linear, norm 1 and 0).
    """
    for module in head.modules():
        fill_(module)
        if isinstance(module, nn.Linear | nn.BatchNorm1d | nn.LayerNorm):
            module.reset_parameters()
        on_init(module)


@torch.no_grad()
def init_follower_(branch: nn.Module, on_init: OnInit = keep_whole) -> None:
    """Room for the parameters of a branch that is a copy of another, and fresh running moments."""
    for module in branch.modules():
        fill_(module)
        if isinstance(module, nn.BatchNorm1d):
            module.reset_running_stats()
        on_init(module)
