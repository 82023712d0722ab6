"""torch.compile for the transformer blocks, where it gives the same numbers."""

from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.settings import Remat


def compile_blocks_(model: nn.Module, *, remat: Remat, settings: dict[str, Any]) -> None:
    """Have torch compile every block of `model` at its first call; before `deepspeed.initialize`.

    Block by block, because whole models break at DeepSpeed's hooks; all blocks of a width share what was
    compiled. Raises ConfigError for what does not go together with it.
    """
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ConfigError(
            'cmae.compile "blocks" and ZeRO stage 3 do not go together: DeepSpeed gathers weights in hooks '
            'that torch cannot compile: write zero_optimization.stage=2 or cmae.compile="none"'
        )
    if "activation_checkpointing" in settings:
        raise ConfigError(
            'cmae.compile "blocks" has no effect inside of "activation_checkpointing", which DeepSpeed runs '
            "uncompiled: write cmae.model.remat=full in its place"
        )
    if remat == "selective":
        raise ConfigError(
            'cmae.compile "blocks" hides the matrix products that cmae.model.remat "selective" would keep: '
            'write "full" or "none"'
        )
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
