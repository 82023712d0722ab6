"""A state's tensors in files: each rank writes one; any rank can read any range of any parameter.

The files are safetensors: plain numbers with a table of contents, nothing in them can run.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import sync

_BUFFER_KEY = re.compile(r"buffer/(?P<name>.+)")
_PART_KEY = re.compile(r"(?P<kind>[a-z_0-9]+)/(?P<name>.+)@(?P<start>[0-9]{1,18})")
_NOT_OF_THE_OPTIMIZER = ("weight", "average", "buffer")


class _Part(NamedTuple):
    """A stored range of a parameter."""

    start: int
    stop: int
    file: int
    key: str


def rank_file_name(rank: int) -> str:
    """The file of `rank`."""
    return f"rank_{rank:05d}.safetensors"


def write_rank_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write and force to disk. Raises OSError when the disk does not take it."""
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    sync(path)


class CheckpointReader:
    """All files of a state as one. Ranges are put together from the parts that ranks of any number wrote."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: list[Any] = [_open(path) for path in paths]
        self._parts: dict[tuple[str, str], list[_Part]] = {}
        self._buffers: dict[str, tuple[int, str]] = {}
        for number, file in enumerate(self._files):
            for key in file.keys():  # noqa: SIM118 -- no mapping
                self._list(number, key)
        for parts in self._parts.values():
            parts.sort()

    @property
    def optimizer_kinds(self) -> list[str]:
        """Names of the optimizer's states."""
        return sorted({kind for kind, _ in self._parts} - set(_NOT_OF_THE_OPTIMIZER))

    @property
    def parameters(self) -> dict[str, int]:
        """Elements of every parameter by name."""
        return {name: parts[-1].stop for (kind, name), parts in self._parts.items() if kind == "weight"}

    def has(self, kind: str, name: str) -> bool:
        """Whether anything of `kind` is stored for the parameter `name`."""
        return (kind, name) in self._parts

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop`; for one number per parameter, such as a step, that number.

        Raises ConfigError when they are not all there.
        """
        parts = self._parts.get((kind, name), [])
        if parts and self._slice(parts[0]).get_shape() == []:
            return self._whole(parts[0])
        found, position = [], start
        at = max(0, bisect_right(parts, start, key=lambda part: part.start) - 1)
        for part in parts[at:]:
            if position >= stop or part.start > position:
                break
            if part.stop > position:
                end = min(stop, part.stop)
                found.append(self._slice(part)[position - part.start : end - part.start])
                position = end
        if position < stop:
            raise ConfigError(f'the state has no "{kind}" of {name} from element {position} to {stop}')
        return found[0] if len(found) == 1 else torch.cat(found)

    def read_buffer(self, name: str, *, shape: torch.Size) -> Tensor:
        """The buffer `name`. Raises ConfigError when none of its size is there."""
        number, key = self._buffers.get(name, (0, ""))
        tensor: Tensor | None = self._files[number].get_tensor(key) if key else None
        if tensor is None or tensor.numel() != shape.numel():
            raise ConfigError(f"the state has no buffer {name} of shape {list(shape)}")
        return tensor.view(shape)

    def _list(self, number: int, key: str) -> None:
        shape = self._files[number].get_slice(key).get_shape()
        if match := _BUFFER_KEY.fullmatch(key):
            self._buffers[match["name"]] = (number, key)
        elif (match := _PART_KEY.fullmatch(key)) and len(shape) <= 1:
            start, length = int(match["start"]), shape[0] if shape else 0
            part = _Part(start, start + length, number, key)
            self._parts.setdefault((match["kind"], match["name"]), []).append(part)
        else:
            raise ConfigError(
                f"{self._paths[number]} holds {key!r} {shape}, which no state does: move the state's folder "
                "away to go on from an older one"
            )

    def _slice(self, part: _Part) -> Any:
        return self._files[part.file].get_slice(part.key)

    def _whole(self, part: _Part) -> Tensor:
        tensor: Tensor = self._files[part.file].get_tensor(part.key)
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is no safetensors file ({error}): it was not written by a run") from None
