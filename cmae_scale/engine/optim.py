"""The optimizer's parameter groups, and the one optimizer that DeepSpeed does not have."""

from typing import Any

from torch import nn

from cmae_scale.core.errors import ConfigError

_NO_DECAY_LEAVES = frozenset({"bias", "pos_embed"})
_TOKENS = frozenset({"cls_token", "mask_token"})


def weight_decay_groups(
    model: nn.Module, *, weight_decay: float, decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with `weight_decay` and without.

    Without are biases, LayerNorm, positions and, unless `decay_tokens`, class and mask tokens. The heads'
    BatchNorm gain decays. Source: official CMAE config (names containing ln, bias, pos_embed, mask_token,
    cls_token): of CMAE-B 120 916 992 parameters decay and 201 216 do not. With `decay_tokens` a model without
    heads is split as MAE's: there exactly what has one dimension does not decay.
    """
    spared = _NO_DECAY_LEAVES if decay_tokens else _NO_DECAY_LEAVES | _TOKENS
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in spared
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_lars(groups: list[dict[str, Any]], *, settings: dict[str, Any]) -> Any:
    """timm's LARS for a run file whose optimizer has that type; DeepSpeed has none of its own.

    Its step depends on the norm of each whole parameter, so ConfigError where DeepSpeed cuts them into flat
    pieces: above ZeRO stage 0, and in a bf16 or fp16 engine.
    """
    from timm.optim import Lars

    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage or any(settings.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        raise ConfigError(
            'optimizer.type "LARS" needs whole fp32 parameters: write zero_optimization.stage=0 (heads are '
            'small) and torch_autocast, or "SGD"'
        )
    params = dict(settings["optimizer"].get("params", {}))
    try:
        return Lars(groups, **params)
    except TypeError as error:
        raise ConfigError(f"optimizer.params: timm's LARS refuses them: {error}") from None
