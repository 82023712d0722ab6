"""The device that a rank computes on, tried before anything is built on it."""

import os
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

from cmae_scale.core.errors import UserError
from cmae_scale.core.world import World

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
