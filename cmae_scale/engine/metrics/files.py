"""RUN/metrics.jsonl as earlier starts of a run left it, and RUN/bad_samples.jsonl."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.files import LineFile, write_whole
from cmae_scale.core.strict_json import parse_line

BadSample = tuple[str, str]  # key and reason


class BadList:
    """RUN/bad_samples.jsonl: every sample that could not be decoded, once, whichever rank met it.

    All ranks call `add` together; the first one writes. What an earlier start of the run listed stays.
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


def set_aside(path: Path) -> Path | None:
    """The new name of the metrics of a run that begins anew: they stay, also without its checkpoints."""
    if not path.is_file() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(1))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    return kept


def drop_later_lines(path: Path, *, step: int) -> int:
    """Cut metrics.jsonl back to the state of `step`, so that a resumed run writes no line twice.

    Returns how many lines were damaged, which go too; the last one may be torn by a kill and does not count.
    """
    if not path.is_file():
        return 0
    lines = path.read_bytes().splitlines()
    steps = [read_line_step(line) for line in lines]
    kept = [line + b"\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    with write_whole(path) as file:
        file.writelines(kept)
    return steps[:-1].count(None)


def read_line_step(line: bytes) -> int | None:
    """The step that a line of metrics tells of; None for one that is damaged."""
    entry = parse_line(line) or {}
    return step if type(step := entry.get("step")) is int else None
