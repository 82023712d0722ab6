"""Splits of a data set, by the names that people give to their folders and files: they never become one."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from cmae_scale.core.errors import ConfigError

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
MERGE = "--merge_splits takes them as one set"


def find_role(name: str) -> str | None:
    """train, val, test or unlabeled, if a name says one of them in any of its usual forms; else None."""
    return ROLES.get(name.lower())


def find_splits(names: Iterable[str]) -> list[str]:
    """Those of some names that are splits of one data set: of two roles at least, or all names."""
    names = list(names)
    splits = [name for name in names if find_role(name)]
    is_sure = len(splits) == len(names) or len({find_role(name) for name in splits}) > 1
    return splits if is_sure else []


def group_files(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the one word in their names that is a role; "" if there is but one set.

    ConfigError for files that say no split beside others that do.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[_read_role(path.stem)].append(path)
    if len(groups) == 1:
        return {"": list(paths)}
    if "" in groups:
        splits = ", ".join(sorted(filter(None, groups)))
        first = next(path for split, files in groups.items() if split for path in files)
        raise ConfigError(
            f"{first.parent} holds files of splits ({splits}) beside {groups[''][0].name}: name those of one "
            f"set, as in --root '{first.parent}/{_read_role(first.stem)}*{first.suffix}', or {MERGE}"
        )
    return dict(groups)


def _read_role(stem: str) -> str:
    """The word of a file's name that says its split; "" if none does, or several."""
    words = {word.lower() for word in re.split(r"[^A-Za-z]+", stem) if find_role(word)}
    return words.pop() if len(words) == 1 else ""
