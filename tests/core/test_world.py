import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.core.world import FIRST_PORT, PORTS, World, choose_port, describe_task, first_host, read_world

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "64",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu[02-09]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert read_world(TASK) == World(rank=5, size=8, local_rank=1)
    assert describe_task(TASK)["MASTER_ADDR"] == "gpu03"


def test_all_tasks_of_a_step_meet_at_one_place_and_other_steps_at_another() -> None:
    places = {describe_task({**TASK, "SLURM_PROCID": str(rank)})["MASTER_PORT"] for rank in range(8)}
    assert len(places) == 1
    assert places != {describe_task({**TASK, "SLURM_STEP_ID": "1"})["MASTER_PORT"]}
    assert places != {describe_task({**TASK, "SLURM_JOB_ID": "4712"})["MASTER_PORT"]}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"},  # the batch script itself
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_what_srun_did_not_start_in_numbers_is_alone(environ: dict[str, str]) -> None:
    assert describe_task(environ) == {}
    assert read_world(environ) == World()


def test_a_launcher_inside_of_srun_has_the_say() -> None:
    launched = {**TASK, "RANK": "17", "WORLD_SIZE": "32", "LOCAL_RANK": "1"}
    assert read_world(launched) == World(rank=17, size=32, local_rank=1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node", "node"),
        ("node1,node2", "node1"),
        ("gpu[03-07,9],login1", "gpu03"),
        ("login1,gpu[03-07,9]", "login1"),
        ("rack[1-2]n[01-16]", "rack1n01"),
        ("cn-[001,005-9]-ib.site.edu", "cn-001-ib.site.edu"),
    ],
)
def test_the_first_host_of_a_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@given(
    prefix=st.from_regex(r"[a-z][a-z.-]{0,8}", fullmatch=True),
    numbers=st.lists(st.integers(0, 9999), min_size=1, max_size=20, unique=True),
    digits=st.integers(1, 4),
)
def test_a_compressed_host_list_names_its_first_host(prefix: str, numbers: list[int], digits: int) -> None:
    ordered = sorted(numbers)
    names = [f"{number:0{digits}}" for number in ordered]
    compressed = f"{prefix}[{','.join(names)}]" if len(names) > 1 else f"{prefix}{names[0]}"
    assert first_host(compressed) == f"{prefix}{names[0]}"
    assert first_host(f"{compressed},other[1-3]") == f"{prefix}{names[0]}"


def test_ports_stay_between_services_and_clients() -> None:
    jobs = [str(random.Random(seed).randrange(10**9)) for seed in range(200)]
    ports = [int(choose_port(job, step)) for job in jobs for step in ("0", "3", "")]
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + PORTS
