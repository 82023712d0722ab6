"""Where shards are written: here, in processes of this machine, or wherever Ray puts them.

All of them take the tasks one by one as there is room, so that only those at work are in memory, and give
back each result when it is there, in any order. The first error ends all.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from cmae_scale.core.errors import ConfigError, DataError
from data_prep.layout import ShardTask
from data_prep.manifest import WrittenShard

EXECUTORS = ("processes", "ray")
TASKS_PER_WORKER = 2  # one at work and one ready
RETRIES = 3  # of a task whose machine was lost: a shard may be written twice, it is the same
REPOSITORY = Path(__file__).resolve().parent.parent

Write = Callable[[ShardTask], WrittenShard]


def run_tasks(
    write: Write, tasks: Iterator[ShardTask], *, executor: str, processes: int
) -> Iterator[WrittenShard]:
    """What `write` returns for each task."""
    match executor:
        case "ray":
            return _run_on_ray(write, tasks)
        case _ if processes == 1:
            return map(write, tasks)
        case _:
            return _run_in_processes(write, tasks, processes=processes)


def _run_in_processes(write: Write, tasks: Iterator[ShardTask], *, processes: int) -> Iterator[WrittenShard]:
    pool = ProcessPoolExecutor(
        max_workers=processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_parent,
    )
    running: set[Future[WrittenShard]] = set()
    try:
        for task in tasks:
            with _inherit_no_interrupt():  # processes start while tasks are submitted
                running.add(pool.submit(write, task))
            if len(running) >= TASKS_PER_WORKER * processes:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise DataError(
            "a writing process was killed (out of memory?): run the same command with fewer --processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _run_on_ray(write: Write, tasks: Iterator[ShardTask]) -> Iterator[WrittenShard]:
    """On the cluster that RAY_ADDRESS names, or on a fresh one of this machine.

    All its machines must see this repository, the images and --out under the same paths.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError('--executor ray needs Ray: pip install "cmae-scale[ray]"') from None
    try:
        ray.init(
            runtime_env={"env_vars": {"PYTHONPATH": str(REPOSITORY)}},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(f"--executor ray: Ray does not start ({error}): look at RAY_ADDRESS") from None
    try:
        call = ray.remote(max_retries=RETRIES)(_call)
        sent = ray.put(write)  # once, not with every task
        room = TASKS_PER_WORKER * max(1, int(ray.cluster_resources().get("CPU", 1)))
        running = []
        for task in tasks:
            running.append(call.remote(sent, task))
            if len(running) >= room:
                done, running = ray.wait(running)
                yield from ray.get(done)
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what the task raised, as other executors give it
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray has given up on a shard ({type(error).__name__}): run the same command again"
        ) from None
    finally:
        ray.shutdown()


def _call(write: Write, task: ShardTask) -> WrittenShard:
    return write(task)


@contextmanager
def _inherit_no_interrupt() -> Iterator[None]:
    """Ctrl-C reaches all processes of a terminal; those started here leave it to their parent to end them.

    A Ctrl-C that comes meanwhile is not lost: it waits for the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """A killed parent cannot stop its pool: each worker watches for that itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
