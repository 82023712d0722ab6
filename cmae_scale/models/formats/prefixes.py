"""Where in a file an encoder's tensors are: under which wrappers and prefixes, and which of several."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from cmae_scale.core.errors import ConfigError

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
