"""Encoders to start from: an exported folder or a timm model, as the same timm VisionTransformer."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer
from torch import Tensor, nn

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.settings import ModelConfig, Pool, ViewsConfig
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.init import init_transformer_
from cmae_scale.models.weights import CONFIG_FILE, describe_encoder, read_weights
from cmae_scale.sizing.sizes import EncoderSize

TIMM, LOCAL = "timm:", "local-dir:"
_POOLS = {"mean": "avg", "cls": "token"}


@dataclass(frozen=True)
class PretrainedEncoder:
    """Weights under timm's names and how timm builds what they belong to.

    `mean` and `std` are those of the images that it was trained on.
    """

    place: str
    architecture: str
    args: Mapping[str, Any]
    state: Mapping[str, Tensor] = field(repr=False)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def has_own_pool_norm(self) -> bool:
        """Whether its norm comes after the mean over patches, as in fine-tuned models, instead of before."""
        return "fc_norm.weight" in self.state


def open_encoder(place: str, *, is_random: bool = False, seed: int = 0) -> PretrainedEncoder:
    """The encoder of a folder (RUN/encoder, also as local-dir:FOLDER) or of timm's model "timm:NAME".

    With `is_random` only its architecture counts, and weights are drawn from `seed`, as pre-training starts.
    Raises ConfigError when there is none, or another kind of network.
    """
    encoder = (
        _open_timm(place.removeprefix(TIMM), is_random) if place.startswith(TIMM) else _open_folder(place)
    )
    if not is_random:
        return encoder
    state = _draw_weights(build_vit(encoder, img_px=None), seed=seed)
    return PretrainedEncoder(
        f"{place} (random weights)", encoder.architecture, encoder.args, state, encoder.mean, encoder.std
    )


def online_encoder(
    state: Mapping[str, Tensor], *, model: ModelConfig, views: ViewsConfig
) -> PretrainedEncoder:
    """The encoder of a pre-training run from its weights, as its exported folder would give it."""
    config = describe_encoder(model, views=views)
    return PretrainedEncoder(
        "online encoder", config["architecture"], config["model_args"], state, views.mean, views.std
    )


def build_vit(
    encoder: PretrainedEncoder,
    *,
    img_px: int | None,
    pool: Pool = "mean",
    classes: int = 0,
    has_new_norm: bool = False,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """timm's model with the encoder's weights; positions are resized to `img_px` (None: the encoder's own).

    Without `classes` it gives pooled features. `has_new_norm` leaves the trained norm out and puts a fresh
    one after the mean. Source: MAE models_vit.py, official fine-tuning. The head is timm's until it is set.
    """
    args = dict(encoder.args)
    if img_px is not None:
        args["img_size"] = img_px
    args.update(
        num_classes=classes,
        global_pool=_POOLS[pool],
        fc_norm=has_new_norm or encoder.has_own_pool_norm,
        drop_path_rate=drop_path,
    )
    try:
        model = timm.create_model(encoder.architecture, pretrained=False, **args)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"{encoder.place}: timm cannot build it for {img_px} px ({error})") from None
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{encoder.place} is a {type(model).__name__}: give a vision transformer of timm")
    if encoder.state:
        _load_(model, encoder, has_new_norm=has_new_norm)
    return model


def _load_(model: VisionTransformer, encoder: PretrainedEncoder, *, has_new_norm: bool) -> None:
    dropped = ("head.",) + (("norm.", "fc_norm.") if has_new_norm else ())
    state = {name: value for name, value in encoder.state.items() if not name.startswith(dropped)}
    positions = state.get("pos_embed")
    if positions is not None and model.pos_embed is not None and positions.shape != model.pos_embed.shape:
        state["pos_embed"] = resample_abs_pos_embed(
            positions.float(),
            new_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=0 if model.no_embed_class else model.num_prefix_tokens,
        )
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"{encoder.place}: weights do not fit ({str(error).splitlines()[-1].strip()})"
        ) from None
    missing = [name for name in missing if not name.startswith(("head.", "fc_norm."))]
    if missing or unexpected:
        raise ConfigError(
            f"{encoder.place}: its weights are of another network than its {CONFIG_FILE} describes "
            f"(missing {missing[:3]}, unknown {list(unexpected)[:3]})"
        )


def _open_folder(place: str) -> PretrainedEncoder:
    folder = Path(place.removeprefix(LOCAL))
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        cfg = config.get("pretrained_cfg", {})
        return PretrainedEncoder(
            str(folder),
            config["architecture"],
            config.get("model_args") or {},
            read_weights(folder),
            tuple(cfg["mean"]),
            tuple(cfg["std"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"no encoder at {place} ({type(error).__name__}: {error}): give a run's encoder/ folder, a timm "
            f'model\'s folder with {CONFIG_FILE}, or "{TIMM}NAME"'
        ) from None


def _open_timm(name: str, is_random: bool) -> PretrainedEncoder:
    try:
        model = timm.create_model(name, pretrained=not is_random, num_classes=0)
    except Exception as error:  # timm, its hub and the network beneath raise what they like
        raise ConfigError(f"{TIMM}{name} cannot be opened: {str(error).splitlines()[0]}") from None
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{TIMM}{name} is a {type(model).__name__}: give a vision transformer")
    cfg = model.pretrained_cfg
    state = {} if is_random else dict(model.state_dict())
    return PretrainedEncoder(f"{TIMM}{name}", name, {}, state, tuple(cfg["mean"]), tuple(cfg["std"]))


def _draw_weights(model: VisionTransformer, *, seed: int) -> dict[str, Tensor]:
    """Weights of a plain ViT as pre-training begins with them."""
    attention, linear = model.blocks[0].attn, model.blocks[0].mlp.fc1
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = Encoder(
            EncoderSize(model.embed_dim, len(model.blocks), attention.num_heads),
            patch_size=model.patch_embed.patch_size[0],
            grid=model.patch_embed.grid_size[0],
            mlp_ratio=linear.out_features / linear.in_features,
        )
        init_transformer_(fresh)
    state: dict[str, Tensor] = fresh.state_dict()
    return state


def set_head_(head: nn.Linear, *, std: float, seed: int) -> None:
    """Start a classifier near zero, equally on all ranks. Source: official config, MAE (std 2e-5, bias 0)."""
    nn.init.trunc_normal_(head.weight, std=std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
