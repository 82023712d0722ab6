"""RUN/bad_samples.jsonl: every sample that could not be decoded, once, whichever rank met it."""

import json
from collections.abc import Sequence
from pathlib import Path

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.files import LineFile
from cmae_scale.core.strict_json import parse_line

BadSample = tuple[str, str]  # key and reason


class BadList:
    """Collects what ranks found. All ranks call `add` together; the first one writes.

    Samples that an earlier part of the run has listed already are not listed again.
    """

    def __init__(self, path: Path, *, is_first: bool) -> None:
        self._file = LineFile(path)
        self._is_first = is_first
        self._known = set(_read_keys(path)) if is_first else set()

    def add(self, found: Sequence[BadSample]) -> None:
        """List those of all ranks that are not listed yet."""
        everywhere = gather_objects(list(found))
        if not self._is_first:
            return
        lines = []
        for key, reason in dict(entry for entries in everywhere for entry in entries).items():
            if key not in self._known:
                self._known.add(key)
                lines.append(json.dumps({"key": key, "reason": reason}) + "\n")
        if lines:
            self._file.add("".join(lines))  # on a full disk they wait; the run's own lines say so


def _read_keys(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = map(parse_line, path.read_bytes().splitlines())
    return [key for line in lines if line and isinstance(key := line.get("key"), str)]
