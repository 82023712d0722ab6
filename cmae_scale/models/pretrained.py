"""Encoders to start from: an exported folder, another project's file, or a timm model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from pydantic import BaseModel, ConfigDict, ValidationError
from timm.models import VisionTransformer
from torch import Tensor

from cmae_scale.config.cmae import ModelConfig, ViewsConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.strict_json import parse_json
from cmae_scale.models.formats.model_file import read_model_file
from cmae_scale.models.formats.names import WHOSE
from cmae_scale.models.formats.shapes import HeadCounts
from cmae_scale.models.weights import CONFIG_FILE, describe_encoder, read_weights

TIMM, LOCAL = "timm:", "local-dir:"
WHOLE = "cmae"  # the "architecture" of a folder with all parts of a pre-training model


@dataclass(frozen=True)
class PretrainedEncoder:
    """Weights under timm's or ConvMAE's names, and how what they belong to is built (see networks.py).

    `mean` and `std` are those of the images that it was trained on.
    """

    place: str
    architecture: str
    args: Mapping[str, Any]
    state: Mapping[str, Tensor] = field(repr=False)  # empty: only the architecture counts
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notices: tuple[str, ...] = ()  # what had to be assumed

    @property
    def is_hybrid(self) -> bool:
        """Whether convolutional stages come before the transformer; timm has no such model."""
        return "conv" in self.args

    @property
    def has_own_pool_norm(self) -> bool:
        """Whether its norm comes after the mean over patches, as in fine-tuned models, instead of before."""
        return "fc_norm.weight" in self.state


def open_encoder(place: str, *, with_weights: bool = True, num_heads: int | None = None) -> PretrainedEncoder:
    """The encoder of a run, a folder (RUN/encoder, local-dir:FOLDER), a file, or timm's model "timm:NAME".

    Of a run, or of one of its checkpoints, it is that of the newest one, whether it has ended or not. A
    file, or a folder without a config.json of ours or timm's, may have any layout that `formats` reads: MAE,
    ConvMAE, official CMAE (whose weights are made to take RGB), Hugging Face; `num_heads` is for sizes that
    nobody published. Raises ConfigError when there is no encoder, or another kind of network.
    """
    if place.startswith(TIMM):
        return _open_timm(place.removeprefix(TIMM), with_weights)
    path = Path(place.removeprefix(LOCAL))
    config = _read_config(path)
    if config is None or config.get("architecture", WHOLE) == WHOLE:
        return _open_file(path, num_heads)
    return _open_folder(path, config)


def online_encoder(
    state: Mapping[str, Tensor], *, model: ModelConfig, views: ViewsConfig
) -> PretrainedEncoder:
    """The encoder of a pre-training run from its weights, as its exported folder would give it."""
    config = describe_encoder(model, views=views)
    return PretrainedEncoder(
        "online encoder", config["architecture"], config["model_args"], state, views.mean, views.std
    )


def _read_config(path: Path) -> dict[str, Any] | None:
    """The folder's config.json; None for a file or a folder without one."""
    if not path.exists():
        raise ConfigError(
            f"no encoder at {path}: give a run's folder, a timm model's folder, a file of weights, or "
            f'"{TIMM}NAME"'
        )
    file = path / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"no encoder at {path}: its {CONFIG_FILE} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"no encoder at {path}: its {CONFIG_FILE} is no JSON object")
    return config


class _Prepared(BaseModel):
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _Description(BaseModel):
    """What is read of a config.json of a run's or timm's."""

    model_config = ConfigDict(protected_namespaces=())

    architecture: str
    model_args: dict[str, Any] | None = None
    pretrained_cfg: _Prepared


def _open_folder(folder: Path, config: Mapping[str, Any]) -> PretrainedEncoder:
    try:
        about = _Description.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"no encoder at {folder}: its {CONFIG_FILE} does not say '{place}' as a run's or timm's does "
            f"({first['msg']})"
        ) from None
    prepared = about.pretrained_cfg
    return PretrainedEncoder(
        str(folder),
        about.architecture,
        about.model_args or {},
        read_weights(folder),
        prepared.mean,
        prepared.std,
    )


def _open_file(path: Path, num_heads: int | None) -> PretrainedEncoder:
    # the decoders are not used, so any number does for them
    heads = HeadCounts(encoder=num_heads, pixel_decoder=1, feature_decoder=1)
    file = read_model_file(path, heads=heads).to_rgb()
    state = file.part("online_encoder")
    if not state:
        raise ConfigError(f"{path} has no encoder, only {', '.join(file.parts)}")
    norms = {name: value for name, value in file.part("classifier").items() if name.startswith("fc_norm.")}
    views = file.cfg.views.model_copy(update={"mean": file.mean, "std": file.std})
    config = describe_encoder(file.cfg.model, views=views, final_norm="norm.weight" in state)
    return PretrainedEncoder(
        str(path),
        config["architecture"],
        config["model_args"],
        {**state, **norms},
        file.mean,
        file.std,
        (f"{path} has {WHOSE[file.layout]}", *file.notices),
    )


def _open_timm(name: str, with_weights: bool) -> PretrainedEncoder:
    try:
        model = timm.create_model(name, pretrained=with_weights, num_classes=0)
    except Exception as error:  # timm, its hub and the network beneath raise what they like
        raise ConfigError(f"{TIMM}{name} cannot be opened: {str(error).splitlines()[0]}") from None
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{TIMM}{name} is a {type(model).__name__}: give a vision transformer")
    cfg = model.pretrained_cfg
    state = dict(model.state_dict()) if with_weights else {}
    return PretrainedEncoder(f"{TIMM}{name}", name, {}, state, tuple(cfg["mean"]), tuple(cfg["std"]))
