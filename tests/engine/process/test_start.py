"""Starting on machines that are not here: Slurm, GPUs, drivers and control groups are played."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.world import World
from cmae_scale.engine.process import devices, group
from cmae_scale.engine.process.devices import Cores, has_own_threads, read_quota, share_threads
from cmae_scale.engine.process.group import (
    LAST_RESORT,
    OUTSIDE,
    choose_interface,
    find_interface,
    start_processes,
)
from cmae_scale.engine.process.heartbeat import PATIENT
from cmae_scale.engine.process.peers import find_source

UNLIMITED = float("inf")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment, without what a launcher or a scheduler sets; as it was when the test ends."""
    before = dict(os.environ)
    for name in [*group._NEEDED, "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"]:
        os.environ.pop(name, None)
    yield os.environ  # type: ignore[misc]
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """`driver(text)`: what `nvidia-smi -q` prints; None where there is no such command."""

    def install(text: str | None) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            if text is None:
                raise FileNotFoundError(command[0])
            return subprocess.CompletedProcess(command, 0, stdout=text)

        monkeypatch.setattr(devices.subprocess, "run", run)

    return install


OLD_DRIVER = """
==============NVSMI LOG==============

Driver Version                            : 470.57.02
CUDA Version                              : 11.4

Attached GPUs                             : 2
GPU 00000000:01:00.0
    Product Name                          : Tesla V100-SXM2-32GB
GPU 00000000:02:00.0
    Product Name                          : Tesla V100-SXM2-32GB
"""


class FakeGpus:
    """An accelerator of DeepSpeed's that sees `count` GPUs; work on those in `broken` fails."""

    def __init__(self, count: int) -> None:
        self.count, self.current = count, -1

    def device_name(self, index: int | None = None) -> str:
        return "cuda" if index is None else f"meta:{index}"  # a device that torch has here

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be ...")
        self.current = index


@pytest.mark.parametrize("cuda", ["12.8", None])
def test_a_gpu_that_torch_cannot_use_ends_the_start_in_one_sentence(
    cuda: str | None,
    environ: dict[str, str],
    driver: Callable[[str | None], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver(OLD_DRIVER)
    monkeypatch.setattr(torch.version, "cuda", cuda)

    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver"
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(devices.DeviceError) as error:
        devices.take_device(World())
    told = str(error.value)
    assert "Tesla V100-SXM2-32GB (The NVIDIA driver on your system is too old (found version 11040))" in told
    assert "driver 470.57.02 runs CUDA up to 11.4" in told
    assert (f"built for CUDA {cuda}" if cuda else "built without CUDA") in told
    assert "DS_ACCELERATOR=cpu" in told
    assert "\n" not in told


def test_one_rank_of_a_machine_speaks_of_its_driver(
    environ: dict[str, str], driver: Callable[[str | None], None]
) -> None:
    driver(OLD_DRIVER)
    for local_rank in range(2):
        with pytest.raises(devices.DeviceError) as error:
            devices.take_device(World(rank=4 + local_rank, size=8, local_rank=local_rank))
        assert error.value.is_everywhere == (local_rank > 0)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (None, {}),  # no driver
        ("Driver Version : 535.1\nCUDA Version : 12.2\nAttached GPUs : 0\n", {}),
        (OLD_DRIVER, {"DS_ACCELERATOR": "cpu"}),
        (OLD_DRIVER, {"CUDA_VISIBLE_DEVICES": ""}),
        (OLD_DRIVER, {"CUDA_VISIBLE_DEVICES": "-1"}),
        (OLD_DRIVER, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}),  # what Slurm writes for a job without GPUs
    ],
)
def test_without_a_gpu_or_where_it_is_declined_the_cpu_computes(
    text: str | None,
    settings: dict[str, str],
    environ: dict[str, str],
    driver: Callable[[str | None], None],
) -> None:
    driver(text)
    environ.update(settings)
    assert devices.take_device(World()) == torch.device("cpu")


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [
        (0, 1, 0),
        (3, 1, 0),  # srun --gpus-per-task=1: every task sees its own as the first
        (3, 4, 3),  # every task sees all of the machine's
        (3, 2, 1),  # every task sees two of its own
    ],
)
def test_a_rank_takes_its_own_gpu_however_many_it_sees(
    local_rank: int, visible: int, index: int, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = FakeGpus(visible)
    monkeypatch.setattr(devices, "get_accelerator", lambda: gpus)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 2.0)
    assert devices.take_device(World(local_rank, 8, local_rank)).index == index
    assert gpus.current == index
    assert environ["LOCAL_RANK"] == str(index)  # DeepSpeed takes it from there


def test_a_gpu_that_fails_its_first_kernel_is_named(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(devices, "get_accelerator", lambda: FakeGpus(4))
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(devices.DeviceError, match=r"meta:2 cannot be used .*no kernel image.*DS_ACCELERATOR"):
        devices.take_device(World(2, 4, 2))


def slots(*processors: int, host: str = "a", quota: float = UNLIMITED) -> Cores:
    return Cores(host, frozenset(processors), quota)


@pytest.mark.parametrize(
    ("every", "threads"),
    [
        ([slots(*range(8))], 8),
        ([slots(*range(64))] * 8, 8),
        ([slots(*range(6))] * 4, 1),
        ([slots(*range(2))] * 4, 1),  # at least one
        ([slots(0, 1, 2), slots(3, 4, 5)], 3),  # bound to processors of their own, as Slurm does it
        ([slots(0, 1, 2, 3), slots(2, 3, 4, 5)], 3),
        ([slots(*range(9))] * 3, 3),
        ([slots(*range(64), quota=4.0)] * 2, 2),  # a container's share of a large machine
        ([slots(*range(64), quota=2.5)], 2),
        ([slots(*range(8)), slots(*range(8), host="b")], 8),
    ],
)
def test_processors_are_shared_among_the_ranks_that_may_use_them(every: list[Cores], threads: int) -> None:
    assert share_threads(every[0], every) == threads


def test_no_processor_is_promised_twice_whatever_the_binding(rng: torch.Generator) -> None:
    for _ in range(100):
        draws = torch.rand(5, 16, generator=rng) < 0.6
        every = [slots(0, *(draw.nonzero().flatten().tolist())) for draw in draws]
        union = frozenset().union(*(one.processors for one in every))
        assert sum(share_threads(one, every) for one in every) <= max(len(union), len(every))


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "max 100000\n"}, UNLIMITED),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, UNLIMITED),
        ({}, UNLIMITED),
    ],
)
def test_the_quota_of_a_container_is_read(files: dict[str, str], quota: float, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("environ", "launcher", "own"),
    [
        ({}, {}, False),
        ({"OMP_NUM_THREADS": "3"}, {}, True),
        ({"OMP_NUM_THREADS": "1"}, {}, True),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"PATH": "/bin"}, False),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, {"OMP_NUM_THREADS": "1"}, True),
        ({"OMP_NUM_THREADS": "4", "TORCHELASTIC_RUN_ID": "none"}, {}, True),
    ],
)
def test_threads_that_torchrun_set_are_not_the_users(
    environ: dict[str, str], launcher: dict[str, str], own: bool
) -> None:
    assert has_own_threads(environ, launcher=launcher) is own


@pytest.mark.parametrize("own", [None, "1"])
def test_threads_follow_the_share_unless_the_user_has_set_them(
    own: str | None, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(devices, "read_cores", lambda: slots(*range(16)))
    monkeypatch.setattr(devices, "gather_objects", lambda mine: [mine] * 2)
    if own:
        environ["OMP_NUM_THREADS"] = own
    devices.settle_threads()
    assert set_to == ([] if own else [8])
    assert environ["OMP_NUM_THREADS"] == (own or "8")  # for OpenMP libraries that are loaded later


def test_a_lone_process_needs_no_launcher(environ: dict[str, str]) -> None:
    environ.update(MASTER_ADDR="another.machine", WORLD_SIZE="4")  # left over from a script
    group.settle_environment()
    assert {name: environ[name] for name in group._NEEDED[:4]} == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
    }


def test_a_task_of_srun_gets_what_a_launcher_would_have_set(environ: dict[str, str]) -> None:
    environ.update(
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_TASKS="4",
        SLURM_PROCID="3",
        SLURM_LOCALID="1",
        SLURM_JOB_ID="12",
        SLURM_STEP_NODELIST="n[7-8]",
        MASTER_PORT="29999",
    )
    group.settle_environment()
    assert [environ[name] for name in group._NEEDED] == ["3", "4", "1", "n7", "29999"]


def test_half_a_launcher_is_refused(environ: dict[str, str]) -> None:
    environ.update(RANK="1", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match="RANK is set without LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        group.settle_environment()


def test_a_taken_port_is_told_at_once(let_ranks_end: Callable[..., Any]) -> None:
    def be() -> int:
        import sys

        from cmae_scale.engine.process.group import PeerMissingError, start_processes

        with socket.socket() as other_run:
            other_run.bind(("", 0))
            other_run.listen()
            os.environ["MASTER_PORT"] = port = str(other_run.getsockname()[1])
            try:
                start_processes()
            except PeerMissingError as error:
                print(str(error).replace(port, "PORT"), file=sys.stderr)
                return error.exit_status
        return 0

    (ended,) = let_ranks_end(be, ranks=1)
    assert ended.status == 1
    assert "port PORT of" in ended.stderr
    assert "--master_port" in ended.stderr
    assert "waited" not in ended.stderr


def test_two_ranks_on_one_gpu_are_told_so(environ: dict[str, str]) -> None:
    environ.update(MASTER_ADDR="a", MASTER_PORT="1")
    told = group.explain_failure(
        "NCCL error, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA",
        World(1, 2, 1),
        waited_s=1.0,
    )
    assert "rank 1 computes on the same GPU as another rank" in told


def test_a_process_may_open_as_many_files_as_it_may_allow_itself() -> None:
    code = (
        "import resource, torch, deepspeed;"  # before the limit falls: an import opens files itself
        "from cmae_scale.engine.process.group import raise_file_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); raise_file_limit();"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    for soft, hard, expected in [(64, 900, 900), (900, 900, 900), (512, 100_000, 65_536), (64, 64, 64)]:
        if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
            continue
        text = code.format(soft=soft, hard=hard)
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
        assert done.stdout.split()[-2:] == [str(expected), str(hard)]


INTERFACES = {"127.0.0.1": "lo", "10.1.2.3": "eth0", "192.168.9.9": "ib0"}


@pytest.mark.parametrize(
    ("environ", "routes", "expected"),
    [
        # the way to the first machine, whatever launched the ranks
        ({"LOCAL_WORLD_SIZE": "8"}, {"node1": "192.168.9.9"}, "ib0"),
        ({"LOCAL_SIZE": "8"}, {"node1": "10.1.2.3"}, "eth0"),
        ({"SLURM_STEP_NUM_NODES": "2"}, {"node1": "10.1.2.3"}, "eth0"),
        # on the first machine its own name leads nowhere: the way out
        ({"LOCAL_WORLD_SIZE": "8"}, {"node1": "127.0.0.1", OUTSIDE: "10.1.2.3"}, "eth0"),
        ({"LOCAL_WORLD_SIZE": "8"}, {"node1": "127.0.1.1"}, None),
        ({"LOCAL_WORLD_SIZE": "8"}, {}, None),
        ({"LOCAL_WORLD_SIZE": "8"}, {"node1": "10.9.9.9"}, None),
        # one machine, or the user's own choice
        ({"LOCAL_WORLD_SIZE": "16"}, {"node1": "10.1.2.3"}, None),
        ({"SLURM_STEP_NUM_NODES": "1"}, {"node1": "10.1.2.3"}, None),
        ({}, {"node1": "10.1.2.3"}, None),
        ({"LOCAL_WORLD_SIZE": "8", "GLOO_SOCKET_IFNAME": "ib0"}, {"node1": "10.1.2.3"}, None),
    ],
)
def test_gloo_talks_over_the_way_to_the_first_machine(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], routes: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(group, "find_interface", INTERFACES.get)
    monkeypatch.setattr(group, "find_source", routes.get)
    assert choose_interface({"WORLD_SIZE": "16", "MASTER_ADDR": "node1", **environ}) == expected


def test_the_interfaces_of_this_machine_are_found_by_their_addresses() -> None:
    source = find_source("127.0.0.1")
    assert source == "127.0.0.1"
    assert find_interface(source) == "lo"
    assert find_source("no such host") is None
    assert find_interface("192.0.2.1") is None
    outside = find_source(OUTSIDE)
    assert outside is None or find_interface(outside) not in (None, "lo")


@pytest.mark.dist
@pytest.mark.parametrize("step_timeout_s", [0.75, 600.0])
def test_collectives_fail_long_after_the_watchdog_has_spoken(
    on_ranks: Callable[..., list[Any]], step_timeout_s: float
) -> None:
    def measure() -> tuple[float, str]:
        """Seconds until rank 0 gives up on rank 1, and how."""
        import time

        import torch.distributed as dist

        from cmae_scale.engine.process.agreement import RankAgreement
        from cmae_scale.engine.process.signals import StopRequest

        context = start_processes(step_timeout_s=step_timeout_s)
        agreement = RankAgreement(StopRequest(), step_timeout_s=step_timeout_s)
        if step_timeout_s > 60:  # as long as it takes
            time.sleep(5 * context.world.rank)
        elif context.world.rank:
            time.sleep(12)
            return 0.0, ""
        began_s = time.monotonic()
        failed = ""
        for wait in (lambda: dist.all_reduce(torch.ones(1)), lambda: agreement.answer(lambda: 1)):
            try:
                wait()
            except RuntimeError as error:
                failed += type(error).__name__
        return time.monotonic() - began_s, failed

    (waited_s, failed), _ = on_ranks(measure, ranks=2)
    if step_timeout_s > 60:
        assert not failed
    else:
        assert failed
        assert waited_s >= LAST_RESORT * step_timeout_s
        assert LAST_RESORT > PATIENT
