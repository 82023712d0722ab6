"""How many threads a rank computes with: the processors that it may use, shared with the ranks beside it."""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch

from cmae_scale.core.collectives import gather_objects

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
