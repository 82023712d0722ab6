"""How many bytes of tensors are alive, operation by operation: memory as the allocator is asked for it."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, while it is entered, the storages that operations make or touch, each once, until they die.

    `now` is their size, `peak` the largest since `reset`. What an operation allocates and frees
    inside of itself is not seen, nor is what libraries hold for themselves. Slow: for tests and measurements.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}

    def reset(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Count these too, which were there before."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self._sizes:
            self._watched[place] = weakref.ref(storage, lambda _: self._forget(place))
        self.now += size - self._sizes.get(place, 0)  # a storage may have been resized
        self._sizes[place] = size

    def _forget(self, place: int) -> None:
        self.now -= self._sizes.pop(place, 0)
        self._watched.pop(place, None)
