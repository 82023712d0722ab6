"""A GPU that is not there: tensors without values on "cuda", and a note of whatever makes the host wait.

Tensors on the CPU are real ones, with values; those on the GPU have shape, type and device alone (torch's
FakeTensorMode). An operation on both raises as it does on a GPU. Where the host asks for a value, or waits
for a copy, that is noted with its place, and made-up values go on: so a step shows all its waits.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from cmae_scale.data import stream
from tests.fakes.streams import Streams

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REPOSITORY = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(torch.__file__).resolve().parent.parent


class Wait(NamedTuple):
    """What the host waited for, and the function that asked: "cmae_scale/engine/ema.py:update_"."""

    what: str
    place: str


class FakeGpu(FakeTensorMode):
    """`waits` fill while it is entered (see `fake_gpu`); `streams` knows which work comes after which."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []
        self.flags = False  # what the host is told of "is anything wrong", and of all other truths
        self.streams = Streams(self.wait)

    @property
    def avoid_device_init(self) -> bool:
        """Whatever `torch.cuda.is_available` says."""
        return True

    def check_collective(self, func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """What ranks.FakeRanks puts here is asked about every collective."""

    def wait(self, what: str) -> None:
        """Note that the host waits, and at whose request."""
        self.waits.append(Wait(what, find_place()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation for real on the CPU, without values on the GPU."""
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            # C++ sees them on "meta", where autograd needs no driver; Python sees them on the GPU
            return torch.device("meta")
        if (asked := kwargs.get("device")) is not None and torch.device(asked).type == "meta":
            kwargs["device"] = CUDA
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kwargs.pop("pin_memory", None)  # needs a driver
        if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default:  # NCCL's needs no tensor
            self.check_collective(func, args, tensors)
            written = [leaf for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor)]
            self.streams.send(tensors, written, is_async=_is_async(func, args, kwargs))
        is_for_cpu = torch.device(kwargs.get("device") or CPU).type == "cpu"
        if is_for_cpu and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func.name().startswith("aten::_foreach") and len({is_on_gpu(one) for one in tensors}) > 1:
            return self._run_one_by_one(func, args, kwargs)
        if (answer := self._answer(func, args, kwargs)) is not None:
            return answer[0]
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = [args[0], self._list_indices(args[0], args[1]), *args[2:]]
        with self.streams.enqueue(func, tensors) as made:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            made += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return result

    def _run_one_by_one(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Lists of tensors that lie here and there: each place of the lists by itself, as torch does it."""
        count = len(args[0])
        if count == 1:
            if func is aten._foreach_copy_.default:
                with self:
                    args[0][0].copy_(args[1][0], *args[2:], **kwargs)
                return None
            raise RuntimeError(f"{func.name()}: a tensor on the CPU beside one on the GPU")

        def pick(arg: Any, place: int) -> Any:
            return [arg[place]] if isinstance(arg, list | tuple) and len(arg) == count else arg

        with self:
            results = [func(*(pick(arg, place) for arg in args), **kwargs) for place in range(count)]
        return None if results[0] is None else [result[0] for result in results]

    def _answer(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any] | None:
        """What an operation that the host waits for gives, in a tuple; None for all others."""
        if func is aten._local_scalar_dense.default:
            self._wait_for_stream("_local_scalar_dense", args[0])
            return (self._make_up((), args[0].dtype).item(),)
        if func in READS:
            self._wait_for_stream(func.name().removeprefix("aten::"), args[0])
            with self:
                return (READS[func](*args, **kwargs),)
        if func in (aten.masked_fill.Tensor, aten.masked_fill_.Tensor) and is_on_gpu(args[2]):
            self._wait_for_stream("masked_fill by a value on the GPU", args[2])
        if func is aten._to_copy.default:
            source, device = args[0], torch.device(kwargs.get("device") or args[0].device)
            if device.type == "cpu":
                self._wait_for_stream("copy to the CPU", source)
                return (self._make_up(source.shape, kwargs.get("dtype") or source.dtype),)
            if not is_on_gpu(source) and not kwargs.get("non_blocking"):
                self.wait("blocking copy to the GPU")
        elif func is aten.copy_.default:
            target, source, non_blocking = args[0], args[1], (*args, False)[2] or kwargs.get("non_blocking")
            if not is_on_gpu(target):
                self._wait_for_stream("copy to the CPU", source)
                return (target.copy_(self._make_up(source.shape, source.dtype)),)
            if not is_on_gpu(source) and not non_blocking:
                self.wait("blocking copy to the GPU")
        return None

    def _make_up(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Values where nobody knows them: one, and of what tells that something is wrong `flags`."""
        is_flag = dtype in (torch.bool, torch.uint8)
        return torch.full(tuple(shape), int(self.flags or not is_flag), dtype=dtype)

    def _wait_for_stream(self, what: str, tensor: Tensor) -> None:
        """The host waits until the current stream has read `tensor`."""
        with self.streams.enqueue(aten.clone.default, [tensor]):
            pass
        self.streams.join(self.streams.current.known)
        self.wait(what)

    def _list_indices(self, tensor: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The indices as whole numbers on the GPU, and a note of what has to be brought there or counted."""
        listed: list[Tensor | None] = []
        for index in indices:
            if index is None:
                listed.append(None)
                continue
            if not is_on_gpu(index) and index.dim() and is_on_gpu(tensor):
                self.wait("index from the CPU")
                with self:
                    index = torch.empty(index.shape, dtype=index.dtype, device=CUDA)
            if index.dtype in (torch.bool, torch.uint8):
                self.wait("boolean index")
                with self:
                    numbers = torch.empty(index.numel(), dtype=torch.int64, device=index.device)
                listed += [numbers] * index.dim()
            else:
                listed.append(index)
        return listed


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it lies on the GPU that is not there."""
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _is_async(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a collective leaves it to `Work.wait` to put later work after it."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    given = {**given, **kwargs}
    return bool(given.get("async_op", given.get("asyncOp", True)))  # an older name


def _on_gpu(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=CUDA)


# what else tells the host a value or a number of elements, with a made-up answer
READS: dict[Any, Callable[..., Any]] = {
    aten.is_nonzero.default: lambda tensor: False,
    aten.equal.default: lambda one, other: True,
    aten.nonzero.default: lambda tensor: _on_gpu((tensor.numel(), tensor.dim()), torch.int64),
    aten.masked_select.default: lambda tensor, mask: _on_gpu((tensor.numel(),), tensor.dtype),
    aten._unique2.default: lambda tensor, *args, **kwargs: tuple(
        _on_gpu((tensor.numel(),), dtype) for dtype in (tensor.dtype, torch.int64, torch.int64)
    ),
    aten.unique_consecutive.default: lambda tensor, *args, **kwargs: tuple(
        _on_gpu((tensor.numel(),), dtype) for dtype in (tensor.dtype, torch.int64, torch.int64)
    ),
    aten.unique_dim.default: lambda tensor, *args, **kwargs: (
        tensor.clone(),
        *(_on_gpu((len(tensor),), torch.int64) for _ in range(2)),
    ),
    aten.bincount.default: lambda tensor, weights=None, minlength=0: _on_gpu(
        (max(1, minlength),), torch.int64
    ),
    aten.repeat_interleave.Tensor: lambda repeats, output_size=None: _on_gpu((repeats.numel(),), torch.int64),
}


PROPERTIES = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0)


_PASSED_OVER = ("torch/", "deepspeed/accelerator/", "deepspeed/comm/", "tests/fakes/")


def find_place() -> str:
    """The innermost function outside of torch and of these fakes, as "path:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # an environment may lie in the repository
        folder = next((one for one in (SITE_PACKAGES, REPOSITORY) if path.is_relative_to(one)), None)
        if folder is not None:
            name = path.relative_to(folder).as_posix()
            if not name.startswith(_PASSED_OVER):
                return f"{name}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Inside, "cuda" is a GPU without values, and `torch.cuda` answers as if it were there."""
    gpu = FakeGpu()
    answers: dict[str, Any] = {
        "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_capability": lambda *args: (9, 0),
        "torch.cuda.get_device_name": lambda *args: "NVIDIA H100 80GB HBM3",
        "torch.cuda.set_device": lambda *args: None,
        **{
            f"torch.cuda.{name}": lambda *args: 0
            for name in (
                "max_memory_allocated",
                "memory_allocated",
                "memory_reserved",
                "max_memory_reserved",
                "reset_peak_memory_stats",
                "reset_max_memory_allocated",
                "empty_cache",
            )
        },
        "torch.cuda.get_device_properties": lambda *args: PROPERTIES,
        "torch.cuda.memory_stats": lambda *args: {},
        "torch.Tensor.is_cuda": property(is_on_gpu),
        "torch.Tensor.to": _to,
        "torch.Tensor.pin_memory": lambda tensor, *args: tensor,
        "torch.nn.Module._apply": _apply,
    }
    with ExitStack() as stack:
        stack.enter_context(_seeing_meta())
        for name, answer in {**answers, **gpu.streams.answers()}.items():
            owner, _, attribute = name.rpartition(".")
            stack.enter_context(patch.object(_find(owner), attribute, answer))
        stack.callback(stream._side_stream.cache_clear)  # of a device that is gone
        stream._side_stream.cache_clear()
        with gpu:
            yield gpu


_TO = Tensor.to


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`tensor.to`, which C++ would have copy what lies on the GPU already."""
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type in ("cuda", "meta") and is_on_gpu(tensor):
        device = None
    return _TO(
        tensor,
        device=device,
        dtype=dtype or tensor.dtype,
        non_blocking=non_blocking,
        copy=copy,
        **({} if layout is None else {"memory_format": layout}),
    )


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As `nn.Module` moves and converts: a parameter stays the same object where torch can have it so."""
    for child in module.children() if recurse else ():
        child._apply(function)  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                value = function(parameter)
            if type(value) is type(parameter.data):
                parameter.data = value
            else:  # from the CPU to the GPU
                module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _find(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


@contextmanager
def _seeing_meta() -> Iterator[None]:
    """C++ asks a tensor for its device also where no mode is entered."""
    original = FakeTensor.__torch_dispatch__

    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0].fake_mode, FakeGpu):
            return torch.device("meta")
        return original(func, types, args, kwargs or {})

    with patch.object(FakeTensor, "__torch_dispatch__", classmethod(dispatch)):
        yield


def to_fake_gpu(tree: Any) -> Any:
    """The same with empty tensors on the GPU in the place of all tensors; inside of `fake_gpu`."""
    return tree_map(lambda leaf: _on_gpu(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, tree)
