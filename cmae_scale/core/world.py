"""Who this process is among all of the run, as a launcher or Slurm says through the environment."""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from cmae_scale.core.errors import ConfigError


@dataclass(frozen=True)
class World:
    """Place of one process. `rank` in [0, size), `local_rank` counts within one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process looks at what every machine may have for itself, such as a disk."""
        return self.local_rank == 0 or self.is_first

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all (prints, writes the shared files)."""
        return self.rank == 0


def wait_without_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP threads sleep while they wait for one another; call it before torch is imported.

    They spin by default. Where anything else runs on the same cores (our decoding threads, another job), the
    thread that all wait for is then kept from running: on two busy cores a CPU step took 10 times as long as
    with sleeping threads; on two idle ones sleeping costs about a tenth. A setting of the user's own stays.
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that `deepspeed`, `torchrun` or `srun` set up; one lone process when none did.

    Raises ConfigError when the variables are set but cannot be read.
    """
    environ = {**describe_task(environ), **environ}
    try:
        world = World(
            rank=int(environ.get("RANK", 0)),
            size=int(environ.get("WORLD_SIZE", 1)),
            local_rank=int(environ.get("LOCAL_RANK", 0)),
        )
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers ({error})") from None
    if not 0 <= world.rank < world.size:
        raise ConfigError(
            f"RANK {world.rank} is outside of WORLD_SIZE {world.size}: start through a launcher"
        )
    return world


FIRST_PORT, PORTS = 10_000, 20_000  # above the services' ports and below those that Linux lends to clients


def describe_task(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and so on of this task; nothing outside of `srun` and for its only task.

    The batch script itself, and a shell of `salloc`, have the job's variables too, but no SLURM_STEP_ID.
    Source: srun(1), "Output environment variables".
    """
    size = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ or size == "1":
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(choose_port(environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"])),
    }


def first_host(nodes: str) -> str:
    """The first name of a host list such as "gpu[03-07,9],login1": gpu03, where rank 0 is."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else nodes)


def choose_port(job: str, step: str) -> int:
    """A port that all tasks of a step agree on, and that no other job on the node is likely to have."""
    digits = [int(re.sub(r"\D", "", text) or 0) for text in (job, step)]
    return FIRST_PORT + (digits[0] * 16 + digits[1]) % PORTS


def find_free_port() -> int:
    """A port of this machine that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
