"""The loader beside others that do the same work, in one process and one run, by CPU time per sample.

Every contestant turns the same images, as shards or as files, into uint8 random resized crops. Rounds are
interleaved, so that whatever else the machine does meets all of them. None begins anew with a round: what is
measured is the middle of a long run, buffers full, not how fast it starts.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.data.crops import decode_crops
from cmae_scale.data.decode import CROP_DRAWS
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import plan_data
from cmae_scale.data.plan import Purpose, draw_uniforms
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.stream import open_batches
from cmae_scale.report.records import Timing, summarise_timings

BARE = "bare decode and crop, one thread"
BARE_THREADS = "bare decode and crop, in as many"
OURS = "ours"
PEER_WINDOW = 1000  # samples. Source: shuffle size in webdataset's own examples
SETTLE_S = 0.1  # in which threads and processes that fill buffers use more than
IDLE_S = 0.005  # of CPU time


@dataclass(frozen=True)
class Contender:
    """What is run: `samples` images of the shards (and of `folder`, the same as files) in each round."""

    shards: ShardSet
    folder: Path | None
    views: ViewsConfig
    workers: int
    batch: int
    samples: int


Batches = Iterator[
    int
]  # does the work of one batch after another, without end, and says how many samples it was


def benchmark(course: Contender, *, rounds: int) -> dict[str, list[Timing]]:
    """Every contestant once in each round, after one that warms up and does not count."""
    torch.set_num_threads(1)  # as every worker of a DataLoader has it
    with ExitStack() as stack:
        contestants = {
            BARE: prepare_bare(course, threads=1),
            **({BARE_THREADS: prepare_bare(course, threads=course.workers)} if course.workers > 1 else {}),
            OURS: prepare_ours(course, stack),
            "webdataset + torchvision + DataLoader": prepare_webdataset(course),
        }
        if course.folder is not None:
            contestants["ImageFolder + torchvision + DataLoader"] = prepare_image_folder(
                course, course.folder
            )
        timings: dict[str, list[Timing]] = {name: [] for name in contestants}
        for number in range(rounds + 1):
            for name, batches in contestants.items():
                timing = _time_once(batches, steps=course.samples // course.batch)
                if number > 0:
                    timings[name].append(timing)
    return timings


def describe_benchmark(timings: dict[str, list[Timing]]) -> str:
    """Each contestant's lowest CPU time, in lines for people, and our share of the decoder's own."""
    lowest = {name: min(timing.cpu_s for timing in runs) for name, runs in timings.items()}
    title = f"CPU time per sample, lowest of {len(timings[OURS])}"
    lines = [f"{title:40} {'ms':>7} {'per core':>9} {'/ ours':>8}"]
    for name, cpu_s in lowest.items():
        lines.append(f"{name:40} {1e3 * cpu_s:7.3f} {1 / cpu_s:7.0f}/s {cpu_s / lowest[OURS]:7.2f}x")
    for name in (BARE, BARE_THREADS):
        if name in lowest:
            lines.append(f"share of {name}: {lowest[name] / lowest[OURS]:.2f}")
    return "\n".join(lines)


def record_benchmark(timings: dict[str, list[Timing]]) -> dict[str, dict[str, object]]:
    """The same as figures."""
    ours = min(timing.cpu_s for timing in timings[OURS])
    return {
        name: {
            **summarise_timings(runs, per="sample"),
            "times_ours": min(timing.cpu_s for timing in runs) / ours,
        }
        for name, runs in timings.items()
    }


def _time_once(batches: Batches, *, steps: int) -> Timing:
    """From full buffers to full buffers: so much work as it took to make `steps` batches."""
    cpu_s, wall_s = _settle(), time.perf_counter()
    samples = sum(islice(batches, steps))
    wall_s = time.perf_counter() - wall_s
    return Timing((_settle() - cpu_s) / samples, wall_s / samples)


def prepare_bare(course: Contender, *, threads: int) -> Batches:
    """The limit: our decoder alone, on bytes that lie in memory and numbers that are drawn.

    Several threads at once slow each other down, whatever they do: a processor's caches and often its cores
    are shared. So the limit of a loader with so many workers is the decoder in so many threads.
    """
    images = [sample.image for shard in course.shards.shards for sample in shard.read(0, shard.info.samples)]
    draws = [
        draw_uniforms(0, Purpose.CROP, slot=(0, number, 0), count=CROP_DRAWS).tolist()
        for number in range(course.samples)
    ]

    def decode(part: list[tuple[bytes, list[float]]]) -> None:
        for image, numbers in part:
            decode_crops(
                image,
                side=course.views.master_px,
                scale=course.views.crop_scale,
                ratio=course.views.crop_ratio,
                max_mpx=50.0,
                draws=[numbers],
            )

    pairs = zip(cycle(images), cycle(draws), strict=False)
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(pairs, course.batch)):
            parts = [batch[first::threads] for first in range(threads)]
            for done in [pool.submit(decode, part) for part in parts]:
                done.result()
            yield len(batch)


def prepare_ours(course: Contender, stack: ExitStack) -> Batches:
    """Shards to batches, as a run on one rank reads them."""
    data = DataConfig(shards="as given", workers=course.workers)
    plan = plan_data(course.shards, data, global_batch=course.batch, seed=0)
    stream = open_batches(
        course.shards,
        plan,
        views=course.views,
        data=data,
        rank=0,
        ranks=1,
        accumulation=1,
        first_step=0,
        end_step=1 << 40,
        pin=False,
        bad=BadSamples(1.0),
    )
    return (len(batch.images) for batch in stack.enter_context(stream))


def prepare_webdataset(course: Contender) -> Batches:
    """The stock reader with a shuffle buffer, torchvision's decoder, worker processes."""
    import webdataset
    from torchvision.io import ImageReadMode, decode_jpeg

    crop = _build_crop(course.views)

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        return torch.as_tensor(crop(decode_jpeg(data, mode=ImageReadMode.RGB)))

    places = [shard.location for shard in course.shards.shards]
    workers = min(course.workers, len(places))  # more of them would have no shard
    stored = webdataset.WebDataset(places, shardshuffle=100, seed=0).repeat().shuffle(PEER_WINDOW).map(decode)
    return _prepare_loader(course, stored, workers=workers)


def prepare_image_folder(course: Contender, folder: Path) -> Batches:
    """The stock data set on single files, Pillow's decoder, worker processes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([_build_crop(course.views), v2.PILToTensor()])
    files = ImageFolder(str(folder), transform=transform)
    order = torch.utils.data.RandomSampler(files, replacement=True, num_samples=1 << 40)
    return _prepare_loader(course, files, workers=course.workers, sampler=order)


def _build_crop(views: ViewsConfig) -> Callable[[Any], Any]:
    from torchvision.transforms import v2

    crop: Callable[[Any], Any] = v2.RandomResizedCrop(
        views.master_px,
        scale=views.crop_scale,
        ratio=views.crop_ratio,
        interpolation=v2.InterpolationMode.BICUBIC,
        antialias=True,
    )
    return crop


def _prepare_loader(course: Contender, source: Any, *, workers: int, sampler: Any = None) -> Batches:
    loader: Iterable[Any] = DataLoader(
        source, batch_size=course.batch, num_workers=workers, sampler=sampler, persistent_workers=False
    )
    return (len(batch[0] if isinstance(batch, list) else batch) for batch in loader)


def _settle() -> float:
    """CPU time that was used when nobody works any more: seconds of this process and those it has started."""
    before_s = -1.0
    while (now_s := _cpu_seconds()) - before_s > IDLE_S:
        before_s = now_s
        time.sleep(SETTLE_S)
    return now_s


def _cpu_seconds() -> float:
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    running = [Path(f"/proc/{child.pid}/stat") for child in multiprocessing.active_children()]
    # Source: proc_pid_stat(5); the name in brackets may hold blanks, the times are fields 14 and 15
    ticks = [file.read_text().rpartition(")")[2].split()[11:13] for file in running]
    return sum(each.ru_utime + each.ru_stime for each in ended) + sum(
        int(tick) for pair in ticks for tick in pair
    ) / os.sysconf("SC_CLK_TCK")
