"""torch.compile for the transformer blocks, where it gives the same numbers."""

from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

from cmae_scale.config.cmae import Remat
from cmae_scale.core.errors import ConfigError


def compile_blocks_(model: nn.Module, *, remat: Remat, settings: dict[str, Any]) -> None:
    """Have torch compile every block of `model` at its first call; before `deepspeed.initialize`.

    Block by block, because whole models break at DeepSpeed's hooks; all blocks of a width share what was
    compiled. Losses are those of uncompiled blocks (CPU, ZeRO 0 to 2, every checkpointing but "selective").
    Raises ConfigError where compiling makes no sense: at stage 3 the losses are right too, but every Linear
    has a hook that breaks its block's graph, one piece per hook, until torch gives up compiling.
    """
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ConfigError(
            'cmae.compile "blocks" gains nothing at ZeRO stage 3: hooks that gather weights cut each block '
            "into pieces: write zero_optimization.stage=2 or cmae.compile=none"
        )
    if remat == "selective":
        raise ConfigError(
            'cmae.compile "blocks" hides the matrix products that cmae.model.remat "selective" would keep: '
            'write "full" or "none"'
        )
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
