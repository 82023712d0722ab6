"""Who this process is among all processes of the run, as the launcher says through the environment."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.slurm import describe_task


@dataclass(frozen=True)
class World:
    """Place of one process. `rank` in [0, size), `local_rank` counts within one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

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
