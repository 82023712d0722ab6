"""A file of weights of any known origin, under our names, with its sizes, checked to be whole."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from cmae_scale.config.cmae import NetworkConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.strict_json import parse_json
from cmae_scale.layers.blocks import NORM_EPS
from cmae_scale.models.cmae import CMAE
from cmae_scale.models.formats.names import WHOSE, Layout, find_layout, to_ours
from cmae_scale.models.formats.run_states import RunState, open_run, read_network
from cmae_scale.models.formats.shapes import MEAN, STD, HeadCounts, ShapeReader, swap_to_rgb
from cmae_scale.models.hybrid import ENDS
from cmae_scale.models.weights import CONFIG_FILE, PROCESSOR_FILE, read_weights

PRETRAINING_ONLY = tuple(f"online_encoder.{name}." for name in ENDS)  # a fine-tuned model may lack them


@dataclass(frozen=True)
class ModelFile:
    """Tensors under our names: `online_encoder`, and whichever of the other parts the file has."""

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    cfg: NetworkConfig  # sizes spelt out; settings of parts that the file lacks mean nothing
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    is_bgr: bool
    notices: tuple[str, ...]  # what had to be assumed
    class_names: tuple[str, ...] = ()  # of a classifier, where they are known

    @property
    def parts(self) -> list[str]:
        """First names of the tensors: "online_encoder", "pixel_decoder", ..., "classifier"."""
        return sorted({name.split(".")[0] for name in self.tensors})

    def part(self, name: str) -> dict[str, Tensor]:
        """One part's tensors under its own names; empty where the file lacks it."""
        prefix = f"{name}."
        return {n.removeprefix(prefix): tensor for n, tensor in self.tensors.items() if n.startswith(prefix)}

    def describe(self) -> str:
        """What was read, part by part, and what had to be assumed, in lines for people."""
        lines = [f"{self.path} ({WHOSE[self.layout]}), {self.cfg.views.img_px} px images"]
        for part in self.parts:
            tensors = self.part(part)
            count = sum(tensor.numel() for name, tensor in tensors.items() if "running_" not in name)
            lines.append(f"  {part:16} {len(tensors):4} tensors, {count:,} values")
        return "\n".join([*lines, *(f"  {notice}" for notice in self.notices)])

    def to_rgb(self) -> "ModelFile":
        """The same for RGB images: see `channels.swap_to_rgb`."""
        if not self.is_bgr:
            return self
        tensors = swap_to_rgb(self.tensors, mean=self.mean, std=self.std)
        notice = "trained on BGR images; its patch embeddings now take RGB, with the same features"
        return replace(self, tensors=tensors, is_bgr=False, notices=(*self.notices, notice))

    def to_target(self) -> "ModelFile":
        """The encoder's moving average in its place, and nothing else. ConfigError where there is none."""
        target = {f"online_encoder.{name}": tensor for name, tensor in self.part("target_encoder").items()}
        if not target:
            raise ConfigError(f"{self.path} has no target branch, only {', '.join(self.parts)}")
        return replace(self, tensors=target, notices=(*self.notices, "the target branch's encoder"))


def read_model_file(path: Path, *, heads: HeadCounts | None = None) -> ModelFile:
    """The model in a file, in a folder with a config.json of ours, timm's or Hugging Face's, or in a run.

    Of a run's folder the newest whole checkpoint is read: `run_states.open_run`. Raises ConfigError for names
    that its layout does not have, for missing tensors and for wrong shapes, with a list of them.
    """
    source = open_run(path)
    return (
        _read_state(source) if isinstance(source, RunState) else _read_tensors(source, heads or HeadCounts())
    )


def _read_state(state: RunState) -> ModelFile:
    cfg = state.network
    return ModelFile(
        path=state.path,
        layout="ours",
        tensors=state.read(),
        cfg=cfg,
        mean=cfg.views.mean,
        std=cfg.views.std,
        is_bgr=False,
        notices=state.notices,
    )


def _read_tensors(path: Path, heads: HeadCounts) -> ModelFile:
    branch, described = choose_branch(read_weights(path), path=path), _read_config(path)
    layout = find_layout(list(branch.tensors))
    renamed = to_ours(branch.tensors, layout)
    if renamed.unknown:
        raise ConfigError(f"{path} has tensors with none of the {WHOSE[layout]}: {_some(renamed.unknown)}")
    reader = ShapeReader(renamed.tensors, heads=_fill_in(heads, described))
    try:
        written = described.get("cmae") if layout == "ours" else None
        cfg = read_network(written) if written else reader.config()
    except ValidationError as error:
        raise ConfigError(f"{path}: its sizes make no model: {_first_fault(error)}") from None
    has_norm = (described.get("model_args") or {}).get("final_norm", True)
    check_whole(renamed.tensors, cfg, path=path, has_norm=has_norm)
    return ModelFile(
        path=path,
        layout=layout,
        tensors=renamed.tensors,
        cfg=cfg,
        mean=_read_moments(described, "mean", MEAN),
        std=_read_moments(described, "std", STD),
        is_bgr=layout == "cmae" or described.get("channels") == "bgr",
        notices=(
            *branch.notices,
            *reader.notices,
            *([f"left out: {_some(renamed.left_out)}"] if renamed.left_out else []),
            *_compare_arithmetic(described, path=path),
        ),
        class_names=tuple(described.get("label_names") or ()),
    )


def check_whole(
    tensors: Mapping[str, Tensor], cfg: NetworkConfig, *, path: Path, has_norm: bool = True
) -> None:
    """Raise ConfigError unless every part is there as a whole, with the shapes of `cfg`.

    Without `has_norm` the encoder may lack its last norm, as that of a fine-tuned model or a target branch.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in CMAE(cfg, mask=None).state_dict().items()}
    parts = {name.split(".")[0] for name in tensors}
    optional = PRETRAINING_ONLY if "classifier" in parts or not has_norm else ()
    missing = [
        name
        for name in expected
        if name.split(".")[0] in parts and name not in tensors and not name.startswith(optional)
    ]
    if missing:
        raise ConfigError(f"{path} lacks {len(missing)} tensors (under our names): {_some(missing)}")
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    if wrong:
        raise ConfigError(f"{path}: {len(wrong)} tensors do not fit the others: {_some(wrong)}")
    surplus = [name for name in tensors if name not in expected and not name.startswith("classifier.")]
    if surplus:
        raise ConfigError(f"{path} has {len(surplus)} tensors too many (under our names): {_some(surplus)}")


def _read_config(path: Path) -> dict[str, Any]:
    """What a folder's own JSON files say; of a single file nothing is known but its tensors."""
    described: dict[str, Any] = {}
    for name in (PROCESSOR_FILE, CONFIG_FILE) if path.is_dir() else ():
        file = path / name
        if file.is_file():
            try:
                described |= parse_json(file.read_bytes())
            except (OSError, ValueError, TypeError) as error:
                raise ConfigError(f"{file} cannot be read as a JSON object: {error}") from None
    return described


def _fill_in(heads: HeadCounts, described: Mapping[str, Any]) -> HeadCounts:
    """Numbers of heads that the user gave, else those of a config.json of timm's or Hugging Face's."""
    args = described.get("model_args") or {}
    return HeadCounts(
        encoder=heads.encoder or args.get("num_heads") or described.get("num_attention_heads"),
        pixel_decoder=heads.pixel_decoder or described.get("decoder_num_attention_heads"),
        feature_decoder=heads.feature_decoder,
    )


def _compare_arithmetic(described: Mapping[str, Any], *, path: Path) -> list[str]:
    """What a Hugging Face model computes otherwise than ours: told, or refused where it would matter."""
    if (act := described.get("hidden_act", "gelu")) != "gelu":
        raise ConfigError(f'{path} has the activation "{act}", encoders here have "gelu"')
    eps = described.get("layer_norm_eps", NORM_EPS)
    return [] if eps == NORM_EPS else [f"its norms add {eps:g} to the variance, ours {NORM_EPS:g}"]


def _read_moments(
    described: Mapping[str, Any], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    given = (described.get("pretrained_cfg") or {}).get(name, described.get(f"image_{name}"))
    return default if given is None else (float(given[0]), float(given[1]), float(given[2]))


def _some(names: Iterable[str], most: int = 12) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"


# the tensor that every layout has, in the order in which layouts are told apart (see names.find_layout)
_ANCHORS = (
    ("online_encoder.patch_embed.proj.weight", "online_encoder.patch_embed1.proj.weight"),
    ("backbone.patch_embed.projection.weight",),
    ("patch_embed.projection.weight",),
    ("vit.embeddings.patch_embeddings.projection.weight",),
    ("embeddings.patch_embeddings.projection.weight",),
    ("patch_embed.proj.weight", "patch_embed1.proj.weight"),
)
_USUAL = ("model.", "state_dict.", "module.")  # prefixes that nobody needs to hear of
_TRAINING = ("optimizer", "optimizers", "optimizer_states")  # tensors beside the weights that are none
# which of several encoders is meant: the branch that its project evaluates, and weights before their moving
# average beside them. Source: DINO eval_linear.py (teacher), I-JEPA (target_encoder), MoCo v3 main_lincls.py
_PREFERRED = ("", "model", "state_dict", "teacher", "target_encoder", "base_encoder", "encoder_q")


class Branch(NamedTuple):
    """Tensors under the names that their layout gives them, and what the user should know of the choice."""

    tensors: dict[str, Tensor]
    notices: tuple[str, ...] = ()


def choose_branch(tensors: Mapping[str, Tensor], *, path: Path) -> Branch:
    """The encoder's part of `tensors`, without what stands before its names ("module.", "teacher.backbone.").

    Any prefix will do, nested too: it is what stands before the patch embedding. ConfigError where several
    encoders are there and none is the one that such files are known for.
    """
    prefix = _choose(_find_prefixes(tensors), path=path)
    if not prefix:
        return Branch(dict(tensors))
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    beside = Counter(_group(name, prefix) for name in tensors if not name.startswith(prefix))
    left_out = [f"{group} ({count} tensors)" for group, count in beside.items() if group not in _TRAINING]
    notices = [] if prefix in _USUAL else [f"weights taken from {prefix}*"]
    if left_out:
        notices.append(f"left out: {', '.join(left_out)}")
    return Branch(inside, tuple(notices))


def _find_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the patch embedding of each encoder; none where no layout is known."""
    known = list(names)
    for anchors in _ANCHORS:
        found = [
            name.removesuffix(anchor)
            for name in known
            for anchor in anchors
            if name == anchor or name.endswith(f".{anchor}")
        ]
        if found:
            return found
    return [""]


def _choose(prefixes: list[str], *, path: Path) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    words = [prefix.split(".") for prefix in prefixes]
    same = 0
    while len({each[same] for each in words}) == 1:
        same += 1
    first = {each[same]: prefix for each, prefix in zip(words, prefixes, strict=True)}
    for word in _PREFERRED:
        if word in first and sum(each[same] == word for each in words) == 1:
            return first[word]
    raise ConfigError(
        f"{path} holds several encoders ({', '.join(f'{prefix}*' for prefix in prefixes)}): save the tensors "
        "of the one that you mean in a file of their own"
    )


def _group(name: str, prefix: str) -> str:
    """The words of `name` up to the first that `prefix` does not have in its place."""
    words, own = name.split("."), prefix.split(".")
    same = next((place for place, word in enumerate(words) if own[place : place + 1] != [word]), 0)
    return ".".join(words[: same + 1])
