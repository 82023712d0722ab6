"""How much memory a loader holds, epoch after epoch, in a process that does nothing else."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.stream import open_batches


def measure_footprint(data: DataConfig, *, views: ViewsConfig, batch: int, epochs: int) -> list[float]:
    """Resident memory of a fresh process when it has read and decoded each epoch, MiB."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run_epochs, args=(data, views, batch, epochs, there))
    process.start()
    there.close()
    try:
        return [here.recv() for _ in range(epochs)]
    finally:
        process.join()


def _run_epochs(data: DataConfig, views: ViewsConfig, batch: int, epochs: int, results: Connection) -> None:
    shards = open_shards(data.shards, data=data)
    plan = plan_data(shards, data, global_batch=batch, seed=0)
    stream = open_batches(
        shards,
        plan,
        views=views,
        data=data,
        rank=0,
        ranks=1,
        accumulation=1,
        first_step=0,
        end_step=epochs * plan.steps_per_epoch,
        pin=False,
        bad=BadSamples(data.max_bad_fraction),
    )
    with stream:
        for read in stream:
            if (read.step + 1) % plan.steps_per_epoch == 0:
                results.send(_resident_mib())


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])  # Source: proc_pid_statm(5)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
