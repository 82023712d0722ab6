"""An exported encoder's folder as a module, and as what was said of it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn

from cmae_scale.config.cmae import ModelConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.strict_json import parse_json
from cmae_scale.models.build import build_encoder
from cmae_scale.models.encoder import ImageEncoder
from cmae_scale.models.hybrid_classifier import HybridClassifier
from cmae_scale.models.weights import CONFIG_FILE, read_weights

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class EncoderDescription:
    """What an encoder folder's config.json says: the encoder's size, and how its images were prepared."""

    architecture: str  # timm's name, or convvit_...
    model: ModelConfig  # sizes spelt out
    img_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    has_final_norm: bool
    has_fc_norm: bool  # of a classifier: whether a norm follows the mean over patches
    num_classes: int  # 0 without a classifier
    class_names: tuple[str, ...]  # empty where unknown
    crop_pct: float  # img_px / the short side before the centre crop


def read_description(folder: str | Path) -> EncoderDescription:
    """The description in `folder`. Raises ConfigError where there is none, or none of ours."""
    file = Path(folder) / CONFIG_FILE
    try:
        content = parse_json(file.read_bytes())
        args, prepared = content["model_args"], content["pretrained_cfg"]
        return EncoderDescription(
            architecture=content["architecture"],
            model=read_sizes(args),
            img_px=int(args["img_size"]),
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
            has_final_norm=bool(args.get("final_norm", True)),
            has_fc_norm=bool(args.get("fc_norm", True)),
            num_classes=int(content["num_classes"]),
            class_names=tuple(content.get("label_names") or ()),
            crop_pct=float(prepared.get("crop_pct", 0.875)),
        )
    except (OSError, ValueError, LookupError, TypeError, OverflowError, ValidationError) as error:
        raise ConfigError(
            f"{file} does not describe an encoder of this project ({type(error).__name__}): give the encoder "
            "folder of a run"
        ) from None


def read_encoder(folder: str | Path) -> ImageEncoder:
    """The encoder that a run or a conversion wrote to `folder`, with its weights, in evaluation mode.

    Plain transformer or hybrid. Raises ConfigError for weights that do not fit.
    """
    folder = Path(folder)
    about = read_description(folder)
    return _open(
        folder, lambda: build_encoder(about.model, img_px=about.img_px, final_norm=about.has_final_norm)
    )


def read_classifier(folder: str | Path) -> HybridClassifier:
    """The fine-tuned hybrid in a folder, in evaluation mode; timm opens plain transformers itself."""
    folder = Path(folder)
    about = read_description(folder)
    stages = read_stages(about.model)
    if stages is None:
        raise ConfigError(
            f'{folder} is a plain transformer: timm.create_model("local-dir:{folder}") builds it'
        )
    return _open(
        folder,
        lambda: HybridClassifier(
            read_size(about.model),
            stages,
            patch_size=about.model.patch_size,
            grid=about.img_px // about.model.patch_size,
            mlp_ratio=about.model.mlp_ratio,
            num_classes=about.num_classes,
            fc_norm=about.has_fc_norm,
        ),
    )


def _open(folder: Path, build: Callable[[], M]) -> M:
    """What `build` makes, with the folder's weights. ConfigError for sizes or weights that are none."""
    try:
        module = build()
    except (ArithmeticError, RuntimeError, TypeError, ValueError, MemoryError):
        raise ConfigError(
            f"the sizes in {folder / CONFIG_FILE} make no network: copy the folder again"
        ) from None
    try:
        module.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        told = " ".join(str(error).split())[:400]
        raise ConfigError(f"{folder}: the weights are not those of its {CONFIG_FILE}: {told}") from None
    return module.eval()


def read_sizes(args: Mapping[str, Any]) -> ModelConfig:
    """An encoder's sizes from the `model_args` of its config.json. Raises ValidationError."""
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "conv")
    return ModelConfig.model_validate_json(json.dumps({name: args[name] for name in names if name in args}))
