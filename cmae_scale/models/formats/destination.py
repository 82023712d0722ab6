"""Where a conversion may write: never over its input, nor over what somebody else has made."""

from pathlib import Path

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import PART
from cmae_scale.core.strict_json import parse_json
from cmae_scale.models.export import CARD_FILE
from cmae_scale.models.weights import CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE, WRITER

_OURS = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, PROCESSOR_FILE}


def check_destination(out: Path, *, source: Path, suffix: str | None, overwrite: bool) -> None:
    """Raise ConfigError unless `out` may be written from `source`, as a folder or as a file of that `suffix`.

    What does not exist and an empty folder may be. With `overwrite` also a folder that holds nothing but an
    earlier export of ours, or a file of that ending. What is, holds or lies in `source` never may.
    """
    if suffix is not None and out.suffix != suffix:
        raise ConfigError(f"{out} is to be one file: write a name that ends in {suffix}")
    if out.is_symlink() and not out.exists():
        raise ConfigError(f"{out} is a link to nothing: remove it, or write to another place")
    _check_parents(out)
    is_folder = out.is_dir()
    if not out.exists() or (suffix is None and is_folder and not _list_content(out)):
        return
    there, here = out.resolve(), source.resolve()
    if there == here or there in here.parents or here in there.parents:
        raise ConfigError(f"{out} is, or belongs to, what is read: write to another place")
    if is_folder == (suffix is not None):
        kind = "a folder" if is_folder else "no folder"
        raise ConfigError(f"{out} is there already and is {kind}: write to another place")
    if is_folder and not _is_export(out):
        raise ConfigError(f"{out} holds what no conversion has written: write to a new or empty folder")
    if not overwrite:
        raise ConfigError(f"{out} is there already: write to another place, or give --overwrite")


def _check_parents(out: Path) -> None:
    for parent in out.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise ConfigError(f"{out} cannot be made: {parent} is no folder")


def _list_content(folder: Path) -> set[str]:
    """Names in the folder, without what an interrupted export has left."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(PART)}


def _is_export(folder: Path) -> bool:
    """Whether nothing but an export is there, whose config.json says that we wrote it."""
    if not _list_content(folder) <= _OURS:
        return False
    try:
        config = parse_json((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and WRITER.items() <= config.items()
