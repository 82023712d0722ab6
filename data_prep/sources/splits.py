"""Splits of a data set, by the names that people give to their folders and files: they never become one."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cmae_scale.core.errors import ConfigError

ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled"), "unlabeled"),
}
MERGE = "--merge_splits takes them as one set"


class SplitName(NamedTuple):
    """A name with one word in it that says a split: that word, which split, and its other words."""

    word: str
    role: str
    rest: str


def read_split(name: str) -> SplitName | None:
    """The split that a name says; None if none of its words does, or several."""
    words = re.findall("[a-z]+", name.lower())
    said = [word for word in words if word in ROLES]
    if len(set(said)) != 1:
        return None
    return SplitName(said[0], ROLES[said[0]], "-".join(word for word in words if word not in ROLES))


def find_role(name: str) -> str | None:
    """train, val, test or unlabeled, if a name says that and nothing else, as Train or val2017; else None."""
    split = read_split(name)
    return None if split is None or split.rest else split.role


def find_splits(names: Iterable[str]) -> list[str]:
    """Those of some names that are splits of one data set.

    They say two splits at least, in names that are otherwise alike (train, val; seg_train, seg_test; but not
    train_station, test_tube), or all of them say nothing but splits.
    """
    names = list(names)
    if all(name.lower() in ROLES for name in names):
        return names
    roles: dict[str, set[str]] = defaultdict(set)
    read = [(name, split) for name in names if (split := read_split(name)) is not None]
    for _, split in read:
        roles[split.rest].add(split.role)
    return [name for name, split in read if len(roles[split.rest]) > 1]


def group_files(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the one word in their names that is a role; "" if there is but one set.

    ConfigError for files that say no split beside others that do.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[_read_word(path)].append(path)
    if len(groups) == 1:
        return {"": list(paths)}
    if "" in groups:
        splits = ", ".join(sorted(filter(None, groups)))
        first = next(path for split, files in groups.items() if split for path in files)
        raise ConfigError(
            f"{first.parent} holds files of splits ({splits}) beside {groups[''][0].name}: name those of one "
            f"set, as in --root '{first.parent}/{_read_word(first)}*{first.suffix}', or {MERGE}"
        )
    return dict(groups)


def _read_word(path: Path) -> str:
    split = read_split(path.stem)
    return "" if split is None else split.word
