"""What GPUs can do and hold at most: to say how much of it a run uses, or would use."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from cmae_scale.config.precision import FormatName
from cmae_scale.core.errors import ConfigError, nearest


class Gpu(NamedTuple):
    """`flops` are dense matrix products per second in its format of two bytes; None where nobody said."""

    name: str
    flops: float | None
    memory_gib: float
    half: FormatName = "bfloat16"  # before compute capability 8.0: float16


def _listed(name: str, *, tflops: float, memory_gb: float, half: FormatName = "bfloat16") -> Gpu:
    """A data sheet's figures. Its GB are taken as 10^9 bytes: what a card has beyond that stays spare."""
    return Gpu(name, tflops * 1e12, memory_gb * 1e9 / 2**30, half)


# Source: NVIDIA's and AMD's data sheets, without sparsity; SXM and OAM parts unless named otherwise. GeForce
# and A6000: the GA102 and Ada white papers, FP16 with FP32 accumulation. MI250: half of the sheet's 362.1
# TFLOP/s and 128 GB, because its two dies are two devices.
GPUS: tuple[
    Gpu, ...
] = (  # of one family, the one with a suffix stands first: `recognise_gpu` takes the first
    _listed("B200", tflops=2250, memory_gb=180),
    _listed("H200", tflops=989, memory_gb=141),
    _listed("H100-PCIe", tflops=756, memory_gb=80),
    _listed("H100-NVL", tflops=835, memory_gb=94),
    _listed("H100", tflops=989, memory_gb=80),
    _listed("A100-40GB", tflops=312, memory_gb=40),
    _listed("A100", tflops=312, memory_gb=80),
    _listed("L40S", tflops=362, memory_gb=48),
    _listed("L4", tflops=121, memory_gb=24),
    _listed("RTX-A6000", tflops=155, memory_gb=48),
    _listed("RTX-4090", tflops=165, memory_gb=24),
    _listed("RTX-3090", tflops=71, memory_gb=24),
    _listed("MI300X", tflops=1307, memory_gb=192),
    _listed("MI250", tflops=181, memory_gb=64),
    _listed("V100-32GB", tflops=125, memory_gb=32, half="float16"),
    _listed("V100", tflops=125, memory_gb=16, half="float16"),
    _listed("T4", tflops=65, memory_gb=16, half="float16"),
)


class LocalGpus(NamedTuple):
    """The GPUs of this machine: the first one's kind and how many there are."""

    gpu: Gpu
    number: int


def find_gpu(name: str) -> Gpu:
    """The GPU that a user names, whatever the case, spaces and dashes. ConfigError with the nearest one."""
    asked = _plain(name)
    for maker in ("nvidia", "geforce", "tesla", "amd", "instinct"):
        asked = asked.removeprefix(maker)
    for gpu in GPUS:
        full = f"{gpu.name}-{_size_of(gpu)}"
        if asked in {_plain(gpu.name), _plain(gpu.name).removeprefix("rtx"), _plain(full)}:
            return gpu
    names = [gpu.name for gpu in GPUS]
    hint = nearest(name.upper(), names)
    raise ConfigError(
        f'--gpu "{name}" is not listed{hint}; known are {", ".join(names)} and cpu; describe another with '
        "--memory_gib and --tflops"
    )


def name_cpus_half() -> FormatName:
    """What is likely the faster format of matrix products on this CPU: training measures it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return "float32"
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags) else "float32"


def recognise_gpu(device_name: str) -> Gpu | None:
    """The GPU that calls itself `device_name`, such as "NVIDIA A100-SXM4-80GB"; None if it is not listed."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    for gpu in GPUS:
        if words.issuperset(gpu.name.lower().split("-")):
            return gpu
    return None


def find_local_gpus() -> LocalGpus | None:
    """The GPUs that NVIDIA's driver lists here, also one that is not known by name; None without any."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    if not lines:
        return None
    name, mib = lines[0]
    gpu = recognise_gpu(name) or Gpu(name.strip(), None, 0)
    return LocalGpus(gpu._replace(memory_gib=float(mib) / 1024), len(lines))


def _size_of(gpu: Gpu) -> str:
    return f"{round(gpu.memory_gib * 2**30 / 1e9)}GB"


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
