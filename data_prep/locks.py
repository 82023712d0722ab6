"""Who is at work in a folder. The kernel lets go of a lock however its process ends, on NFS too."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import hold
from data_prep.layout import Part

MERGING = ".merging.lock"


@contextmanager
def hold_part(out: Path, part: Part) -> Iterator[None]:
    """The right to write the shards of `part`.

    ConfigError while another process has it, or while one shares the folder into another number of parts.
    Where the file system has no locks nothing is checked: whole files of the same content replace each other.
    """
    with hold(out / _name(part), wait=False) as is_held:
        if not is_held:
            raise ConfigError(f"another make_shards is writing {_say(part, out)}: wait for it or {_OTHER}")
        for path in out.glob(".making-*-of-*.lock"):
            other = _parse(path)
            if other is not None and other.of != part.of:
                with hold(path, wait=False) as is_free:
                    if not is_free:
                        raise ConfigError(
                            f"another make_shards is writing {_say(other, out)}: give all the same number "
                            f"of parts, wait for it or {_OTHER}"
                        )
        yield


@contextmanager
def hold_merge(out: Path) -> Iterator[None]:
    """The right to write the index; waits for whoever has it."""
    with hold(out / MERGING, wait=True):
        yield


_OTHER = "write another --out"


def _name(part: Part) -> str:
    return f".making-{part.number}-of-{part.of}.lock"


def _parse(path: Path) -> Part | None:
    numbers = re.fullmatch(r"\.making-(\d+)-of-(\d+)\.lock", path.name)
    return None if numbers is None else Part(int(numbers[1]), int(numbers[2]))


def _say(part: Part, out: Path) -> str:
    return f"to {out}" if part.of == 1 else f"part {part.number}/{part.of} of {out}"
