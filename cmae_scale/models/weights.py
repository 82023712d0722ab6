"""Weights in and out: the encoder as a timm model in a folder, and files of tensors."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmae_scale.config.cmae import EncoderName, ModelConfig, ViewsConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART, sync, write_text

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
OLD_WEIGHTS_FILE = "pytorch_model.bin"  # what timm and transformers wrote before safetensors
PROCESSOR_FILE = "preprocessor_config.json"  # Hugging Face's, of how images are prepared
WRITER = {"exported_by": "cmae-scale"}  # in every config.json that is written here

# timm needs a registered name; all that matters is said again in model_args
TIMM_NAMES: dict[EncoderName | None, str] = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
    None: "vit_base_patch16_224",
}
HYBRID_NAME = "convvit"  # of a hybrid whose sizes are spelt out


def export_encoder(
    state: Mapping[str, Tensor], folder: Path, *, model: ModelConfig, views: ViewsConfig
) -> None:
    """Write a folder that `cmae_scale.models.read_encoder` builds, and timm too unless it is a hybrid.

    `state` is the online encoder's state_dict, or the same gathered from an engine; without `norm` it
    describes an encoder without the final norm.
    """
    has_norm = "norm.weight" in state
    write_model(state, folder, config=describe_encoder(model, views=views, final_norm=has_norm))


def write_model(state: Mapping[str, Tensor], folder: Path, *, config: Mapping[str, Any]) -> None:
    """Write a folder of model.safetensors, in fp32, and config.json.

    Each file appears only whole, weights first; an older export is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS_FILE + PART)
    tensors = {name: _stored(tensor) for name, tensor in state.items()}
    try:
        save_file(tensors, part, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ConfigError(
            f"the model cannot be written to {folder} ({error}): make room and start the same command again"
        ) from None
    sync(part)
    part.replace(folder / WEIGHTS_FILE)
    write_text(folder / CONFIG_FILE, json.dumps({**config, **WRITER}, indent=2) + "\n")
    (folder / PROCESSOR_FILE).unlink(missing_ok=True)  # of an older export for Hugging Face
    sync(folder)


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.contiguous().clone()  # apart from tensors that share its memory


def say_how_to_load(model: ModelConfig, *, folder: Path) -> str:
    """What opens an exported encoder, for people."""
    return f'cmae_scale.models.read_encoder("{folder}")' if model.is_hybrid else f"timm: local-dir:{folder}"


def describe_encoder(model: ModelConfig, *, views: ViewsConfig, final_norm: bool = True) -> dict[str, Any]:
    """The encoder's config.json: how to build it and how its images were prepared, in timm's words.

    A hybrid has timm's layout too, under a name of its own ("convvit_base") that timm does not know.

    Without a classifier it gives the mean of the normed patch tokens, because neither loss looks at the class
    token. Source: the official fine-tuning pools the patches too.
    """
    size, stages = read_size(model), read_stages(model)
    if stages is None:
        name = TIMM_NAMES[model.encoder]
        # the norm stays where it was trained: before the mean
        special = {"global_pool": "avg", "fc_norm": False}
    else:
        name, special = model.encoder or HYBRID_NAME, {"conv": stages._asdict()}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": size.embed_dim,
        "global_pool": "avg",
        "model_args": {
            **size._asdict(),
            "img_size": views.img_px,
            "patch_size": model.patch_size,
            "mlp_ratio": model.mlp_ratio,
            **special,
            **({} if final_norm else {"final_norm": False}),
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
            "first_conv": "patch_embed.proj" if stages is None else "patch_embed1.proj",
            "classifier": "head",
        },
    }


class _Bystander:
    """What stands in for an object beside the weights: it takes everything and does nothing."""

    def __init__(self, *args: object) -> None:
        del args

    def __setstate__(self, state: object) -> None:
        del state


# Source: MAE, ConvMAE (arguments); mmengine 0.10 (its log buffers), as torch names what it would refuse
_BYSTANDERS: list[Any] = [
    (_Bystander, name)
    for name in (
        "argparse.Namespace",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.ndarray",
        "numpy.dtype",
        "builtins.getattr",
    )
]


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a torch file or an exported encoder's folder, on the CPU.

    A torch file may hold them in dictionaries of dictionaries, whose keys become the names' first words:
    "model.cls_token" (MAE), "state_dict.cls_token" (mmengine), "teacher.backbone.cls_token" (DINO).
    No code in it is ever run: of other objects only those that such checkpoints are known to keep beside
    the weights are passed over. Raises ConfigError when there is nothing to read.
    """
    names = (WEIGHTS_FILE, OLD_WEIGHTS_FILE)
    file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file():
        missing = path / WEIGHTS_FILE if path.is_dir() else path
        raise ConfigError(
            f"no weights at {missing}: give a .safetensors or .pth file, a run's encoder folder, or a run "
            "that has saved a state"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(_BYSTANDERS):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: a damaged byte leads torch's unpickler anywhere
        raise ConfigError(
            f"{file} cannot be read as weights: save a dictionary of tensors alone, best as safetensors"
        ) from error
    tensors = _name_tensors(content)
    if not tensors:
        raise ConfigError(f"{file} holds no named tensors")
    return tensors


def _name_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of nested dictionaries by their dotted keys. Each counts once, so none is a trap."""
    tensors: dict[str, Tensor] = {}
    waiting, seen = deque([("", content)]), {id(content)}
    while waiting:
        prefix, holder = waiting.popleft()
        for key, value in holder.items() if isinstance(holder, dict) else ():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{key}.", value))
    return tensors
