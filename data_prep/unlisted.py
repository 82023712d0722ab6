"""Files that a source found and does not take: what is left out is told, however much it is."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath

KIND = "unlisted"
BUFFER_BYTES = 1 << 20
ENDING = re.compile(r"\.[a-z][a-z0-9]{0,7}")  # others are parts of names: numbers, dates
REASONS_TOLD = 6  # skipped.jsonl has them all
HIDDEN = "hidden"
FROM_SYSTEM = "left by an operating system"
SYSTEM_NAMES = frozenset(
    (
        "__macosx",
        ".ds_store",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "@eadir",
        "$recycle.bin",
        "lost+found",
    )
)


class Unlisted:
    """Names with reasons, in the order they were found, kept in a file without a name as a Listing is.

    A folder that was not looked into is one name, with a slash at its end. `counts` says how many have
    which reason; there are few of those.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", buffering=BUFFER_BYTES)  # noqa: SIM115 -- lives as long
        self.counts: Counter[str] = Counter()

    def add(self, name: str, reason: str) -> None:
        """Note one more."""
        self._file.write(json.dumps([name, reason]) + "\n")
        self.counts[reason] += 1

    def __iter__(self) -> Iterator[tuple[str, str]]:
        self._file.seek(0)
        for line in self._file:
            name, reason = json.loads(line)
            yield name, reason

    def describe(self) -> Iterator[str]:
        """A line for a user; none if nothing was left out."""
        if total := self.counts.total():
            told = [f"{count:,} {reason}" for reason, count in self.counts.most_common(REASONS_TOLD)]
            if more := len(self.counts) - len(told):
                told.append(f"and {more} more reasons")
            yield f"not listed {total:,}: {', '.join(told)}; skipped.jsonl names each"


def is_clutter(name: str) -> str | None:
    """Why a file or folder of this name is no data of anybody's; None if it may be."""
    if name.lower() in SYSTEM_NAMES or name.startswith("._"):
        return FROM_SYSTEM
    return HIDDEN if name.startswith(".") else None


def say_other_file(name: str) -> str:
    """The reason of a file whose name does not end as that of an image."""
    ending = PurePath(name).suffix.lower()
    return f"no image by name ({ending if ENDING.fullmatch(ending) else 'without an ending'})"
