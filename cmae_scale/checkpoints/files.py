"""A state's tensors in files: each rank writes one; any rank can read any range of any parameter.

The files are safetensors: plain numbers with a table of contents, nothing in them can run.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cmae_scale.checkpoints.commit import FileEntry
from cmae_scale.core.errors import ConfigError

_BUFFER_KEY = re.compile(r"buffer/(?P<name>.+)")
_PART_KEY = re.compile(r"(?P<kind>[a-z_0-9]+)/(?P<name>.+)@(?P<start>[0-9]{1,18})")
_NOT_OF_THE_OPTIMIZER = ("weight", "average", "buffer")
_BLOCK_BYTES = 2**20  # written while they are still in the cache from hashing
_DTYPES = {  # in the order of safetensors' own writer, from the last to the first
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


class _Part(NamedTuple):
    """A stored range of a parameter."""

    start: int
    stop: int
    file: int
    key: str


def rank_file_name(rank: int) -> str:
    """The file of `rank`."""
    return f"rank_{rank:05d}.safetensors"


def write_rank_file(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write tensors, and force them to disk: the size of the file, and the SHA-256 of what was given.

    It is taken on the way, so nothing is read again, and what the disk changes is seen. Raises OSError when
    the disk does not take it.
    """
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for block in _cut(_lay_out(tensors)):
            digest.update(block)
            _write_all(file, block)
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _lay_out(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file: its table of contents, then the tensors, those of wide numbers first.

    Source: the format's description in safetensors' README.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (-order.index(tensors[name].dtype), name))
    table, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().reshape(-1)  # one after the other: they need little memory
        yield memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _cut(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        for start in range(0, len(piece), _BLOCK_BYTES):
            yield piece[start : start + _BLOCK_BYTES]


def _write_all(file: BinaryIO, block: memoryview) -> None:
    while len(block):
        block = block[file.write(block) :]  # a nearly full disk takes a part


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
