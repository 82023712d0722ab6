"""Weights in and out: the encoder as a timm model in a folder, and files of tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, sync, write_text
from cmae_scale.core.settings import ModelConfig, ViewsConfig
from cmae_scale.models.sizes import read_size

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

# timm needs a registered name; all that matters is said again in model_args
TIMM_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    None: "vit_base_patch16_224",
}


def export_encoder(
    state: Mapping[str, Tensor], folder: Path, *, model: ModelConfig, views: ViewsConfig
) -> None:
    """Write a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads: same features.

    `state` is the online encoder's state_dict, or the same gathered from an engine. Weights are stored in
    fp32.
    """
    write_timm_folder(state, folder, config=timm_config(model, views=views))


def write_timm_folder(state: Mapping[str, Tensor], folder: Path, *, config: Mapping[str, Any]) -> None:
    """Write weights and timm's description of them; each file whole, weights first, over an older export."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS_FILE + PART)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, part, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ConfigError(
            f"the weights cannot be written to {folder} ({error}): make room and start the same command again"
        ) from None
    sync(part)
    part.replace(folder / WEIGHTS_FILE)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    sync(folder)


def timm_config(model: ModelConfig, *, views: ViewsConfig) -> dict[str, Any]:
    """timm's description of the encoder: how to build it and how its images were prepared.

    Without a classifier it gives the mean of the normed patch tokens, because neither loss looks at the class
    token. Source: the official fine-tuning pools the patches too.
    """
    size = read_size(model)
    return {
        "architecture": TIMM_NAMES[model.encoder],
        "num_classes": 0,
        "num_features": size.embed_dim,
        "global_pool": "avg",
        "model_args": {
            **size._asdict(),
            "img_size": views.img_px,
            "patch_size": model.patch_size,
            "mlp_ratio": model.mlp_ratio,
            "global_pool": "avg",
            "fc_norm": False,  # the norm stays where it was trained: before the mean
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, views.img_px, views.img_px],
            "fixed_input_size": True,
            "pool_size": None,
            "interpolation": "bicubic",
            "crop_pct": 0.875,  # 224 of 256. Source: timm, official evaluation
            "crop_mode": "center",
            "mean": list(views.mean),
            "std": list(views.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a torch file or an exported encoder's folder, on the CPU.

    A torch file holds them at its top, under "model" (MAE, DINO) or under "state_dict" (mmengine, Lightning);
    no code in it is ever run. Raises ConfigError when there is nothing to read.
    """
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"no weights at {file}: give a .safetensors or .pth file, or a run's encoder folder"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: a damaged byte leads torch's unpickler anywhere
        raise ConfigError(
            f"{file} cannot be read as weights: save a dictionary of tensors alone, best as safetensors"
        ) from error
    return _find_tensors(content, file)


def _find_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f'{file} holds no named tensors, at its top or under "model" or "state_dict"')
    return tensors
