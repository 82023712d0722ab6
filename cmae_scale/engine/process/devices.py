"""The processors of a rank: its share of the CPU cores, and its device, tried before anything is built."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import UserError
from cmae_scale.core.world import World
from cmae_scale.sizing.hardware import recognise_gpu

CGROUP = Path("/sys/fs/cgroup")


class Cores(NamedTuple):
    """What one process may compute on: processors of its machine, `quota` of them at a time."""

    host: str
    processors: frozenset[int]
    quota: float


def settle_threads() -> None:
    """Share the processors out; all ranks call it together. A setting of the user's own stays.

    OpenMP libraries that are loaded later, such as DeepSpeed's Adam on the CPU, take it from the environment.
    """
    mine = read_cores()
    threads = share_threads(mine, gather_objects(mine))
    if not has_own_threads(os.environ, launcher=read_parent_environ()):
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def read_cores() -> Cores:
    """This process's: the affinity that Slurm, a container or taskset gave it, and its container's quota."""
    every = range(os.cpu_count() or 1)
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every
    return Cores(socket.gethostname(), frozenset(processors), read_quota())


def read_quota(folder: Path = CGROUP) -> float:
    """Processors' worth of time that the control group grants, version 2 or 1; infinite without a limit."""
    with suppress(OSError, ValueError):  # "max" is no number
        granted, period = (folder / "cpu.max").read_text().split()
        return int(granted) / int(period)
    with suppress(OSError, ValueError):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        granted, period = ((folder / "cpu" / name).read_text() for name in names)
        if int(granted) > 0:
            return int(granted) / int(period)
    return float("inf")


def share_threads(mine: Cores, every: Sequence[Cores]) -> int:
    """Threads of the rank that has `mine`, where all ranks have `every`, its own among them.

    A processor that several ranks may use counts for each of them in part, so that ranks bound to processors
    of their own take all of those, and unbound ones share the machine.
    """
    here = [other for other in every if other.host == mine.host]
    share = sum(Fraction(1, sum(one in other.processors for other in here)) for one in mine.processors)
    return max(1, int(min(share, mine.quota / len(here))))


def has_own_threads(environ: Mapping[str, str], *, launcher: Mapping[str, str]) -> bool:
    """Whether the user has set OMP_NUM_THREADS, which stays then.

    torchrun sets it to 1 where it is unset. `launcher` is the environment that this process's parent began
    with: what the user has set is there, what torchrun added is not.
    """
    if "TORCHELASTIC_RUN_ID" in environ and environ.get("OMP_NUM_THREADS") == "1":
        return "OMP_NUM_THREADS" in launcher
    return "OMP_NUM_THREADS" in environ


def read_parent_environ() -> dict[str, str]:
    """The environment that the parent process was started with; empty where the system does not tell."""
    with suppress(OSError):
        text = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="replace")
        return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
    return {}


GO_ON = "or set DS_ACCELERATOR=cpu to go on without it"


class DeviceError(UserError):
    """There is a GPU, and PyTorch cannot use it."""


class Driver(NamedTuple):
    """What NVIDIA's driver tells: the first GPU's name, its own version, the newest CUDA that it runs."""

    gpu: str
    version: str
    cuda: str


def take_device(world: World) -> torch.device:
    """The GPU or CPU of this rank, made the current one; LOCAL_RANK is its index from now on.

    A task may see one GPU, its own, or all of its machine: ranks that see as many as there are of them take
    one each in order. Raises DeviceError for a GPU that cannot be used, rather than train on the CPU unasked.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        _refuse_idle_gpu(world, os.environ)
        return torch.device("cpu")
    index = world.local_rank % max(1, accelerator.device_count())
    os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed's engine takes the device of that number
    device = torch.device(accelerator.device_name(index))
    try:
        accelerator.set_device(index)
        torch.ones(2, device=device).sum().item()  # the build may lack this GPU's kernels
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(
            f"{device} cannot be used ({_first_sentence(error)}): look at it with nvidia-smi, {GO_ON}"
        ) from None
    return device


def read_driver() -> Driver | None:
    """What `nvidia-smi` knows; None where it is not installed or finds no GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "-q"],  # noqa: S607 # wherever it is installed
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    names = ("Product Name", "Driver Version", "CUDA Version")
    found = [re.search(rf"{name}\s*:\s*(.+?)\s*$", done.stdout, re.MULTILINE) for name in names]
    if found[0] is None:
        return None
    gpu, version, cuda = ("unknown" if match is None else match[1] for match in found)
    return Driver(gpu, version, cuda)


def _refuse_idle_gpu(world: World, environ: Mapping[str, str]) -> None:
    """Raise DeviceError where a GPU stands by that nobody has hidden or declined."""
    is_hidden = re.match(r"\d|GPU|MIG", environ.get("CUDA_VISIBLE_DEVICES", "0")) is None
    if "DS_ACCELERATOR" in environ or is_hidden:
        return
    driver = read_driver()
    if driver is None:
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    error = DeviceError(
        f"PyTorch cannot use this machine's {driver.gpu} ({_ask_why()}): its driver {driver.version} runs "
        f"CUDA up to {driver.cuda}, PyTorch {torch.__version__} is built {built}; update the driver, install "
        f"the build that fits it (https://pytorch.org/get-started/locally), {GO_ON}"
    )
    error.is_everywhere = world.local_rank > 0  # one voice per machine
    raise error


def _ask_why() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return _first_sentence(error)
    return "it finds none"


def _first_sentence(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.split(". ")[0].rstrip(".")


def name_device(device: torch.device) -> str:
    """The kind of processor, for instance "NVIDIA L4" or "CPU with AVX2"."""
    if device.type == "cuda":
        name: str = torch.cuda.get_device_name(device)
        return name
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def read_peak_flops(device: torch.device) -> float | None:
    """Peak of the GPU `device`, or None for a CPU and for GPUs whose peak is not listed."""
    if device.type != "cuda":
        return None
    gpu = recognise_gpu(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops
