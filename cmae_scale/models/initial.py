"""Starting a run from weights that exist already: whole models of any known origin, or an encoder alone."""

from dataclasses import replace
from pathlib import Path

import torch

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.sizes import read_size
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.cmae import CMAE
from cmae_scale.models.formats.model_file import PRETRAINING_ONLY, ModelFile, read_model_file
from cmae_scale.models.formats.names import WHOSE
from cmae_scale.models.formats.shapes import HeadCounts, refit_positions

# may be in one of file and run alone: the target's norm, and what a fine-tuned encoder no longer has
_MAY_DIFFER = ("target_encoder.norm.", *PRETRAINING_ONLY)


def start_from_(model: CMAE, cfg: CmaeConfig, *, path: Path) -> list[str]:
    """Give `model` the weights in `path`, and say what came from where.

    What the file has is taken, fixed positions too: those of MAE are laid out otherwise than ours. Images of
    another size get positions to suit (see `refit_positions`), which is told. What the file lacks: the target
    is a copy of the online branch, as at the start of any run; everything else keeps the starting values of
    the run's seed. What the run has no use for is left out. Weights trained on BGR images are made to take
    RGB. Raises ConfigError where a shape is not the run's.
    """
    file = _fit_grid(read_model_file(path, heads=_read_heads(cfg)).to_rgb(), grid=cfg.grid)
    _check_fit(model, file)
    missing = model.load_state_dict(
        {name: tensor for name, tensor in file.tensors.items() if name in model.state_dict()}, strict=False
    ).missing_keys
    _copy_to_target_(model, missing)
    absent = [name for name in missing if not name.startswith("target_")]
    copied = sorted({name.split(".")[0] for name in missing} - {name.split(".")[0] for name in absent})
    used = {name.split(".")[0] for name in model.state_dict()}
    taken = [part for part in file.parts if part in used]
    notices = [f"started from {path} ({WHOSE[file.layout]}): {', '.join(taken)}", *file.notices]
    if copied:
        notices.append(f"{', '.join(copied)}: a copy of the online branch where {path.name} has none")
    if absent:
        notices.append(f"new, from the seed: {', '.join(_name_parts(absent, file))}")
    if left := [part for part in file.parts if part not in used]:
        notices.append(f"left out: {', '.join(left)}")
    return notices


def _read_heads(cfg: CmaeConfig) -> HeadCounts:
    """The run's own numbers of heads, which no file of tensors says."""
    return HeadCounts(
        encoder=read_size(cfg.model).num_heads,
        pixel_decoder=cfg.model.pixel_decoder.num_heads,
        feature_decoder=cfg.model.feature_decoder.num_heads,
    )


def _fit_grid(file: ModelFile, *, grid: int) -> ModelFile:
    """The same with positions for grid x grid patches."""
    old = file.cfg.grid
    if old == grid:
        return file
    refitted = {n: refit_positions(t, grid=grid) for n, t in file.tensors.items() if n.endswith("pos_embed")}
    are_computed = all(one.is_computed for one in refitted.values())
    how = "are fixed, so computed for" if are_computed else "were learned, so interpolated to"
    notice = f"positions of its {old} x {old} patches {how} {grid} x {grid}"
    positions = {name: one.positions for name, one in refitted.items()}
    return replace(file, tensors=file.tensors | positions, notices=(*file.notices, notice))


def _check_fit(model: CMAE, file: ModelFile) -> None:
    """Raise ConfigError unless the parts that file and run both have are of one size."""
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    both = {name.split(".")[0] for name in state} & {name.split(".")[0] for name in given}
    for name in sorted(state.keys() | given.keys()):
        if name.split(".")[0] not in both or state.get(name) == given.get(name):
            continue
        if name.startswith(_MAY_DIFFER) and (name not in state or name not in given):
            continue
        shapes = [list(place[name]) if name in place else "absent" for place in (given, state)]
        raise ConfigError(
            f"cmae.model.init {file.path} is a model of another size or kind, for instance {name} is "
            f"{shapes[0]} there and {shapes[1]} in this run: give cmae.model and cmae.heads the file's sizes"
        )


@torch.no_grad()
def _copy_to_target_(model: CMAE, missing: list[str]) -> None:
    """Target parameters and fixed positions that no file gave follow the online ones."""
    online = model.state_dict()
    for pair in model.target_pairs():
        if pair.name in missing:
            pair.target.copy_(pair.online)
    for branch in ("encoder", "projector"):
        own = f"target_{branch}."
        followed = "online_encoder." if branch == "encoder" else "projector."
        for name, buffer in model.named_buffers():
            if name.startswith(own) and name in missing:
                buffer.copy_(online[name.replace(own, followed, 1)])


def _name_parts(absent: list[str], file: ModelFile) -> list[str]:
    """Parts by their name where nothing of them was in the file, else tensor by tensor."""
    whole = {name.split(".")[0] for name in absent} - set(file.parts)
    return sorted(whole) + [name for name in absent if name.split(".")[0] not in whole]
