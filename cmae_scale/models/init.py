"""Starting values of the parameters."""

import torch
from torch import nn

from cmae_scale.layers.patches import PatchProjection
from cmae_scale.models.decoder import TokenCompletion
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.hybrid import HybridTrunk, StemProjection

TOKEN_STD = 0.02  # of class and mask tokens. Source: facebookresearch/mae models_mae.py


@torch.no_grad()
def init_transformer_(model: nn.Module) -> None:
    """Give every parameter of an encoder or a decoder its starting value.

    Source: facebookresearch/mae models_mae.py, as official cmae_vit.py: Xavier for every Linear (query, key
    and value together as one matrix) and for the patch embedding as a matrix, whose bias stays torch's. Of
    a hybrid encoder's convolutions only the last embedding is such a matrix, the others stay torch's.
    Source: Alpha-VL/ConvMAE models_convmae.py.
    """
    for module in model.modules():
        match module:
            case StemProjection():
                module.reset_parameters()
            case PatchProjection():
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
            case TokenCompletion():
                nn.init.normal_(module.mask_token, std=TOKEN_STD)
    for module in model.modules():
        if isinstance(module, HybridTrunk):
            nn.init.xavier_uniform_(module.patch_embed3.proj.weight.flatten(1))


@torch.no_grad()
def init_head_(head: nn.Module) -> None:
    """Give every parameter of a projector or predictor torch's own starting value.

    Source: official heads call no initialiser (kaiming-uniform Linear, norm 1 and 0).
    """
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.BatchNorm1d | nn.LayerNorm):
            module.reset_parameters()
