"""An exported encoder's folder as a module, and as what was said of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.settings import ModelConfig
from cmae_scale.models.build import build_encoder
from cmae_scale.models.encoder import ImageEncoder
from cmae_scale.models.weights import CONFIG_FILE, read_weights


@dataclass(frozen=True)
class EncoderDescription:
    """What an encoder folder's config.json says: the encoder's size, and how its images were prepared."""

    architecture: str  # timm's name, or convvit_...
    model: ModelConfig  # sizes spelt out
    img_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_description(folder: Path) -> EncoderDescription:
    """The description in `folder`. Raises ConfigError where there is none, or none of ours."""
    file = folder / CONFIG_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        args, prepared = content["model_args"], content["pretrained_cfg"]
        return EncoderDescription(
            architecture=content["architecture"],
            model=_read_model(args),
            img_px=int(args["img_size"]),
            mean=tuple(prepared["mean"]),
            std=tuple(prepared["std"]),
        )
    except (OSError, ValueError, LookupError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{file} does not describe an encoder of this project ({type(error).__name__}): give the encoder "
            "folder of a run"
        ) from None


def read_encoder(folder: str | Path) -> ImageEncoder:
    """The encoder that a run or a conversion wrote to `folder`, with its weights, in evaluation mode.

    Plain transformer or hybrid, with the final norm. Raises ConfigError for weights that do not fit.
    """
    folder = Path(folder)
    about = read_description(folder)
    encoder = build_encoder(about.model, img_px=about.img_px)
    try:
        encoder.load_state_dict(read_weights(folder))
    except RuntimeError as error:
        raise ConfigError(f"{folder}: the weights are not those of its {CONFIG_FILE}: {error}") from None
    return encoder.eval()


def _read_model(args: dict[str, Any]) -> ModelConfig:
    names = ("embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "conv")
    return ModelConfig.model_validate_json(json.dumps({name: args[name] for name in names if name in args}))
