"""Shared fixtures. Shapes in signatures are checked while tests run (jaxtyping with beartype)."""

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: see core/world.py

import jaxtyping

# not of blocks, which torch compiles, nor of kernels, whose source Triton reads
CHECKED = ["cmae_scale.losses", "cmae_scale.models"]
CHECKED += [f"cmae_scale.layers.{name}" for name in ("attention", "drop_path", "tokens")]
CHECKED += [f"cmae_scale.augment.{name}" for name in ("color", "draws", "erasing", "mixing", "views")]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmae_scale.core.world import find_free_port

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background job of a script is born deaf to it

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

# The first backward pass starts a thread for every GPU, also for one that FakeTensorMode plays where there
# is none, and no process forked later can go backwards. So that first pass is here, before any such play.
torch.zeros(1, requires_grad=True).sum().backward()

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE_S = 500  # for what only a fault keeps from ending, on a machine of any load


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.slow_unless(stage=3, ranks=2)`: of a grid this case is quick, the others are slow."""
    for item in items:
        quick = [mark.kwargs for mark in item.iter_markers("slow_unless")]
        if quick and not any(case.items() <= item.callspec.params.items() for case in quick):  # type: ignore[attr-defined]
            item.add_marker(pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless `-m gpu` asks: autograd that knows one does not survive the fork of ranks."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images of ../shared/data are not here")
    return folder


@pytest.fixture(scope="session")
def on_ranks() -> Callable[..., list[Any]]:
    """`on_ranks(function, ranks=2)`: what `function()` returns on each of so many fresh gloo processes.

    They are forked from this process, which has imported everything already: a second instead of half a
    minute. The environment is that of a launcher; the function starts the process group itself.
    """
    # what DeepSpeed and we import late, once for all ranks to come: seconds each
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401

    import cmae_scale.data.stream
    import cmae_scale.engine.inputs
    import cmae_scale.engine.loop
    import cmae_scale.engine.metrics.logger
    import cmae_scale.engine.pretraining
    import cmae_scale.report  # noqa: F401

    return run_on_ranks


@pytest.fixture(scope="session")
def killed_on_ranks(on_ranks: Callable[..., list[Any]]) -> Callable[..., None]:
    """`killed_on_ranks(function, ranks=2)`: where a rank ends itself by SIGKILL."""

    def run(function: Callable[[], Any], *, ranks: int) -> None:
        with pytest.raises(KilledRankError):
            on_ranks(function, ranks=ranks)

    return run


class KilledRankError(AssertionError):
    """A rank ended without an answer."""


def run_on_ranks(function: Callable[[], Any], *, ranks: int) -> list[Any]:
    context = multiprocessing.get_context("fork")
    port = find_free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_be_rank, args=(function, rank, port, [writer for _, writer in pipes]))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()  # the ranks have it: a pipe ends with its rank
    try:
        answers = []
        for rank, (reader, _) in enumerate(pipes):
            assert reader.poll(PATIENCE_S), f"rank {rank} did not answer within {PATIENCE_S} s"
            try:
                answers.append(pickle.loads(reader.recv_bytes()))
            except EOFError:
                raise KilledRankError(f"rank {rank} ended without an answer") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for rank, (_, error) in enumerate(answers):
        assert error is None, f"rank {rank} failed:\n{error}"
    return [result for result, _ in answers]


def _be_rank(function: Callable[[], Any], rank: int, port: int, writers: list[Connection]) -> None:
    answer, ranks = writers[rank], len(writers)
    for other in writers:
        if other is not answer:
            other.close()
    os.environ.update(rank_environment(rank, ranks, port))
    torch.set_num_threads(1)  # a forked OpenMP pool would hang
    try:
        answer.send_bytes(pickle.dumps((function(), None)))  # tensors by value, not as shared memory
    except BaseException:
        answer.send_bytes(pickle.dumps((None, traceback.format_exc())))
    finally:
        answer.close()
        os._exit(0)  # the parent's exit handlers are not ours to run


@pytest.fixture
def live_bytes() -> "LiveBytes":
    """A counter of the bytes of tensors that are alive, to be entered."""
    return LiveBytes()


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the storages that operations make or touch, each once, until they die.

    `now` is their size, `peak` the largest since `reset`. What an operation allocates and frees
    inside of itself is not seen, nor is what libraries hold for themselves. Slow: for tests and measurements.
    """

    def __init__(self) -> None:
        super().__init__()
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


class Ended(NamedTuple):
    """How a process ended: `status` is negative for a signal."""

    status: int | None
    stderr: str


@pytest.fixture(scope="session")
def let_ranks_end(
    on_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Ended]]:
    """`let_ranks_end(function, ranks=2)`: how fresh gloo processes end that run `function() -> status`.

    For what `on_ranks` cannot: ranks that die. `meanwhile(pids)` runs in this process beside them. Once all
    but the `frozen` rank have ended, or there is nothing to hope for, the rest is killed: its status is None.
    """

    def run(
        function: Callable[[], int | None],
        *,
        ranks: int,
        frozen: int | None = None,
        meanwhile: Callable[[list[int]], None] = lambda pids: None,
    ) -> list[Ended]:
        context = multiprocessing.get_context("fork")
        port = find_free_port()
        folder = tmp_path_factory.mktemp("ranks")
        logs = [folder / f"stderr_{rank}" for rank in range(ranks)]
        processes = [
            context.Process(target=_end_as_rank, args=(function, rank, ranks, port, logs[rank]))
            for rank in range(ranks)
        ]
        started_s = time.monotonic()
        for process in processes:
            process.start()
        waiting = dict(enumerate(processes))
        meanwhile([process.pid or 0 for process in processes])
        while waiting.keys() - {frozen} and time.monotonic() - started_s < PATIENCE_S:
            waiting = {rank: process for rank, process in waiting.items() if process.exitcode is None}
            time.sleep(0.02)
        for process in waiting.values():
            process.kill()
        return [
            Ended(None if rank in waiting else process.exitcode, logs[rank].read_text())
            for rank, process in enumerate(processes)
        ]

    return run


def _end_as_rank(function: Callable[[], int | None], rank: int, ranks: int, port: int, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(rank_environment(rank, ranks, port))
    torch.set_num_threads(1)  # a forked OpenMP pool would hang
    status: int | None = 1
    try:
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status or 0)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What a launcher would set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
