"""What Slurm tells a task of `srun`, in the words of PyTorch's launchers: no launcher is needed then."""

import re
from collections.abc import Mapping

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
