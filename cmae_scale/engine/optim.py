"""The optimizer's parameter groups and its learning rate."""

from typing import Any

from torch import nn

_NO_DECAY_LEAVES = frozenset({"bias", "cls_token", "mask_token", "pos_embed"})


def weight_decay_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with `weight_decay` and without.

    Without are biases, LayerNorm, class and mask tokens and positions. The heads' BatchNorm gain decays.
    Source: official CMAE config (names containing ln, bias, pos_embed, mask_token, cls_token): of CMAE-B
    120 916 992 parameters decay and 201 216 do not. Differs from MAE, where all one-dimensional ones do not.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in _NO_DECAY_LEAVES
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate_(engine: Any, lr: float) -> None:
    """Make the engine's next update use `lr`, unless the run file names a DeepSpeed scheduler of its own."""
    if engine.lr_scheduler is None:
        for group in engine.optimizer.param_groups:
            group["lr"] = lr


def read_learning_rate(engine: Any) -> float:
    """The learning rate in force."""
    return float(engine.optimizer.param_groups[0]["lr"])
