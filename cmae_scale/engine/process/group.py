"""The group of all processes of a run, however they were started, and this one's place in it."""

import fcntl
import logging
import os
import resource
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from cmae_scale.core.errors import ConfigError, UserError
from cmae_scale.core.world import World, describe_task, find_free_port, read_world
from cmae_scale.engine.process.devices import settle_threads, take_device
from cmae_scale.engine.process.heartbeat import Heartbeat
from cmae_scale.engine.process.peers import find_source
from cmae_scale.engine.process.signals import StopRequest
from cmae_scale.engine.zero.patches import skip_unused_op

FILES = 65_536
SIOCGIFADDR = 0x8915  # Source: netdevice(7)
OUTSIDE = "192.0.2.1"  # nobody's address (RFC 5737): the way there is the way out
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerMissingError(UserError):
    """Not all ranks came together."""

    exit_status = 1


@dataclass(frozen=True)
class RankContext:
    """Where this process computes, what it is doing, and whether it was asked to leave."""

    world: World
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    stop: StopRequest = field(default_factory=StopRequest)


LAST_RESORT = 4.0  # times the longest step: the watchdog, at PATIENT times, is to speak before NCCL aborts


def start_processes(
    *, timeout_s: float = 600.0, step_timeout_s: float = 600.0, stop: StopRequest | None = None
) -> RankContext:
    """This rank's place in the group that a launcher or `srun` prepared, or in a group of one.

    All ranks have to come within `timeout_s`; a collective of theirs fails after LAST_RESORT times
    `step_timeout_s`. The processors of a machine are shared out among its ranks, unless OMP_NUM_THREADS is
    the user's own.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    settle_environment()
    raise_file_limit()
    world = read_world()
    device = take_device(world)
    join_group(world, device, timeout_s=timeout_s)
    set_timeout(LAST_RESORT * step_timeout_s)
    settle_threads()
    return RankContext(world=world, device=device, stop=stop or StopRequest())


def stop_processes() -> None:
    """Leave the process group, so that the interpreter ends without warnings."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def settle_environment() -> None:
    """Set what a launcher would have set, for a task of Slurm's or a lone process: else DeepSpeed wants MPI.

    Raises ConfigError when only a part of it is set.
    """
    found = {**describe_task(os.environ), **os.environ}
    if "RANK" not in found:
        found.update(_describe_lone_process())
    if missing := [name for name in _NEEDED if name not in found]:
        raise ConfigError(
            f"RANK is set without {', '.join(missing)}: start through deepspeed, torchrun or srun"
        )
    os.environ.update({name: found[name] for name in _NEEDED})
    if (name := choose_interface(os.environ)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def raise_file_limit() -> None:
    """Allow this process FILES open files, or as many as it may: rank 0 has a connection to every rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def choose_interface(environ: Mapping[str, str]) -> str | None:
    """The network interface for gloo, in a run over several machines whose user has not named one.

    It is the one on the way to the first machine; on that machine itself, the one on the way out. By itself
    gloo takes the address of the host's name, which is 127.0.1.1 in many an /etc/hosts: nobody gets there.
    """
    here = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")  # of torchrun, of deepspeed
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    is_spread = nodes > 1 if here is None else int(here) < int(environ["WORLD_SIZE"])
    if not is_spread or "GLOO_SOCKET_IFNAME" in environ:
        return None
    for goal in (environ["MASTER_ADDR"], OUTSIDE):
        source = find_source(goal)
        if source is not None and not source.startswith("127."):
            return find_interface(source)
    return None


def find_interface(address: str) -> str | None:
    """The name of the network interface that has `address`, of IPv4."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def join_group(world: World, device: torch.device, *, timeout_s: float) -> None:
    """Start the process group. Raises PeerMissingError when not all ranks come within `timeout_s`."""
    skip_unused_op()
    started_s = time.monotonic()
    try:
        deepspeed.init_distributed(
            dist_backend="gloo" if device.type == "cpu" else get_accelerator().communication_backend_name(),
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )
    except torch.distributed.DistError as error:
        why = explain_failure(str(error), world, waited_s=time.monotonic() - started_s)
        raise PeerMissingError(why) from None


def set_timeout(seconds: float) -> None:
    """Have a collective of all ranks fail that takes longer."""
    limit = timedelta(seconds=seconds)
    if hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout(limit)
    else:  # before torch 2.14
        torch.distributed.distributed_c10d._set_pg_timeout(limit)


def explain_failure(text: str, world: World, *, waited_s: float) -> str:
    """What the user can do about torch's complaint `text`."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in text:
        return (
            f"port {port} of {socket.gethostname()} is taken, perhaps by another run: give deepspeed or "
            "torchrun another --master_port, srun another MASTER_PORT in its environment"
        )
    if "Duplicate GPU" in text:
        return (
            f"rank {world.rank} computes on the same GPU as another rank: start at most one rank per GPU, "
            "and let each see its own (srun --gpus-per-task=1) or all of its machine"
        )
    complaint = next(iter(text.strip().splitlines()), "no more is known")
    return (
        f"rank {world.rank} waited {waited_s:.0f} s for all {world.size} ranks to come to {address}:{port} "
        f"({complaint}): look for one that did not start, or for a firewall"
    )


def _describe_lone_process() -> dict[str, str]:
    return dict(zip(_NEEDED, ("0", "1", "0", "127.0.0.1", str(find_free_port())), strict=True))
