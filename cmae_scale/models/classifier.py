"""Classifiers on an encoder: a whole network to fine-tune, or linear heads on frozen features."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae_scale.config.cmae import Pool
from cmae_scale.config.transfer import CropConfig, FinetuneConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.heads import SyncBatchNorm
from cmae_scale.models.networks import POOLS, Network, build_network, list_blocks
from cmae_scale.models.pretrained import PretrainedEncoder
from cmae_scale.models.weights import write_model

PROBE_STD = 0.01  # of the probe's starting weights. Source: MAE main_linprobe.py
_HEAD_PARTS = ("fc_norm.", "norm.", "head.")  # what comes after the blocks


def build_classifier(
    encoder: PretrainedEncoder, cfg: FinetuneConfig, *, img_px: int, classes: int, seed: int
) -> Network:
    """The model to fine-tune: with mean pooling a fresh norm after the mean, and a head near zero.

    With `cfg.blocks`, all parameters but those of the transformer's last blocks and of what follows them are
    frozen.
    """
    model = build_network(
        encoder,
        img_px=img_px,
        pool=cfg.pool,
        classes=classes,
        has_new_norm=cfg.pool == "mean",
        drop_path=cfg.drop_path,
    )
    set_head_(model.head, std=cfg.head_std, seed=seed)
    if cfg.blocks is not None:
        listed, blocks = list_blocks(model)
        depth = len(blocks)
        if cfg.blocks > depth:
            raise ConfigError(f"transfer.task.finetune.blocks {cfg.blocks}: {encoder.place} has {depth}")
        trained = tuple(f"{listed}.{number}." for number in range(depth - cfg.blocks, depth)) + _HEAD_PARTS
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
    return model


class LinearProbe(nn.Module):
    """Linear heads side by side on the frozen encoder's features after a batch norm without weights.

    Source: MAE (arXiv:2111.06377) appendix A.1, main_linprobe.py.
    Differs: the batch norm's moments are of the batch of all ranks, there of one GPU.
    """

    def __init__(self, encoder: Network, *, classes: int, heads: int, seed: int) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.norm = SyncBatchNorm(encoder.num_features, eps=1e-6).requires_grad_(False)
        self.heads = nn.ModuleList(nn.Linear(encoder.num_features, classes) for _ in range(heads))
        for head in self.heads:
            set_head_(head, std=PROBE_STD, seed=seed)

    def forward(self, inputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch heads classes"]:
        """Logits of every head, from images or from features that were computed before."""
        if inputs.ndim == 4:
            with torch.no_grad():
                inputs = self.encoder(inputs)
        rows = self.norm(inputs.float()).to(self.norm.weight.dtype)
        return torch.stack([head(rows) for head in self.heads], dim=1)


def fold_probe(state: Mapping[str, Tensor], *, head: int, eps: float = 1e-6) -> dict[str, Tensor]:
    """A LinearProbe's state as that of a timm model with a plain head: the batch norm goes into the head."""
    encoder = {
        name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")
    }
    scale = torch.rsqrt(state["norm.running_var"].double() + eps)
    weight = state[f"heads.{head}.weight"].double() * scale
    bias = state[f"heads.{head}.bias"].double() - weight @ state["norm.running_mean"].double()
    return {**encoder, "head.weight": weight.float(), "head.bias": bias.float()}


def export_classifier(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    encoder: PretrainedEncoder,
    pool: Pool,
    has_new_norm: bool,
    classes: Sequence[str],
    crop: CropConfig,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, head and all.

    Of a hybrid, `read_classifier` does. The names of the classes are there as timm's `label_names`.
    """
    has_pool_norm = has_new_norm or encoder.has_own_pool_norm
    args = {name: value for name, value in encoder.args.items() if name != "final_norm" or not has_pool_norm}
    config = {
        "architecture": encoder.architecture,
        "num_classes": len(classes),
        "num_features": int(state["head.weight"].shape[1]),
        "global_pool": POOLS[pool],
        "label_names": list(classes),
        "model_args": {
            **args,
            "img_size": crop.img_px,
            **({} if encoder.is_hybrid else {"global_pool": POOLS[pool]}),
            "fc_norm": has_pool_norm,
        },
        "pretrained_cfg": {
            "num_classes": len(classes),
            "input_size": [3, crop.img_px, crop.img_px],
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": crop.centre,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed1.proj" if encoder.is_hybrid else "patch_embed.proj",
            "classifier": "head",
            "label_names": list(classes),
        },
    }
    write_model(state, folder, config=config)


def say_how_to_open(encoder: PretrainedEncoder, folder: Path) -> str:
    """What opens an exported classifier, for people."""
    return (
        f'cmae_scale.models.read_classifier("{folder}")' if encoder.is_hybrid else f"timm: local-dir:{folder}"
    )


def set_head_(head: nn.Module, *, std: float, seed: int) -> None:
    """Start a classifier near zero, equally on all ranks. Source: official config, MAE (std 2e-5, bias 0)."""
    assert isinstance(head, nn.Linear)
    nn.init.trunc_normal_(head.weight, std=std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
