"""The loader beside others that do the same work, in one process and one run, by CPU time per sample.

Every contestant turns the same images, as shards or as files, into uint8 random resized crops. Rounds are
interleaved, so that whatever else the machine does meets all of them.
"""

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from cmae_scale.core.settings import DataConfig, ViewsConfig
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.data.counter_rng import Purpose, draw_uniforms
from cmae_scale.data.decode import CROP_DRAWS
from cmae_scale.data.masters import decode_master
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.stream import open_batches

PEER_WINDOW = 1000  # samples. Source: shuffle size in webdataset's own examples


@dataclass(frozen=True)
class Course:
    """What is run: `samples` images of the shards (and of `folder`, the same as files) in each round."""

    shards: ShardSet
    folder: Path | None
    views: ViewsConfig
    workers: int
    batch: int
    samples: int


@dataclass(frozen=True)
class Lap:
    """One round of one contestant, seconds per sample. CPU time includes worker processes."""

    cpu_s: float
    wall_s: float


Run = Callable[[], int]  # does its round and says how many samples it was


def race(course: Course, *, rounds: int) -> dict[str, list[Lap]]:
    """Every contestant once in each round, after one that warms up and does not count."""
    contestants = {
        "bare decode and crop": prepare_bare(course),
        "ours": prepare_ours(course),
        "webdataset + torchvision + DataLoader": prepare_webdataset(course),
    }
    if course.folder is not None:
        contestants["ImageFolder + torchvision + DataLoader"] = prepare_image_folder(course, course.folder)
    torch.set_num_threads(1)  # as every worker of a DataLoader has it
    laps: dict[str, list[Lap]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            cpu_s, wall_s = _cpu_seconds(), time.perf_counter()
            samples = run()
            lap = Lap((_cpu_seconds() - cpu_s) / samples, (time.perf_counter() - wall_s) / samples)
            if number > 0:
                laps[name].append(lap)
    return laps


def prepare_bare(course: Course) -> Run:
    """The limit: our decoder alone, one thread, on bytes that lie in memory and numbers that are drawn."""
    stored = [sample.image for shard in course.shards.shards for sample in shard.read(0, shard.info.samples)]
    images = [stored[number % len(stored)] for number in range(course.samples)]
    draws = [
        draw_uniforms(0, Purpose.CROP, place=(0, number, 0), count=CROP_DRAWS).tolist()
        for number in range(course.samples)
    ]

    def run() -> int:
        views = course.views
        for image, numbers in zip(images, draws, strict=True):
            decode_master(
                image,
                side=views.master_px,
                scale=views.crop_scale,
                ratio=views.crop_ratio,
                max_mpx=50.0,
                draws=[numbers],
            )
        return len(images)

    return run


def prepare_ours(course: Course) -> Run:
    """Shards to batches, as a run on one rank reads them."""
    data = DataConfig(shards="as given", workers=course.workers)
    plan = plan_data(course.shards, data, global_batch=course.batch, seed=0)

    def run() -> int:
        stream = open_batches(
            course.shards,
            plan,
            views=course.views,
            data=data,
            rank=0,
            ranks=1,
            accumulation=1,
            first_step=0,
            end_step=course.samples // course.batch,
            pin=False,
            bad=BadSamples(1.0),
        )
        with stream:
            return sum(len(batch.images) for batch in stream)

    return run


def prepare_webdataset(course: Course) -> Run:
    """The stock reader with a shuffle buffer, torchvision's decoder, worker processes."""
    import webdataset
    from torchvision.io import ImageReadMode, decode_jpeg

    crop = _build_crop(course.views)

    def decode(sample: dict[str, Any]) -> torch.Tensor:
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        return torch.as_tensor(crop(decode_jpeg(data, mode=ImageReadMode.RGB)))

    places = [shard.place for shard in course.shards.shards]
    workers = min(course.workers, len(places))  # more of them would have no shard
    stored = webdataset.WebDataset(places, shardshuffle=100, seed=0).repeat().shuffle(PEER_WINDOW).map(decode)
    return _prepare_loader(course, stored, workers=workers)


def prepare_image_folder(course: Course, folder: Path) -> Run:
    """The stock data set on single files, Pillow's decoder, worker processes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose([_build_crop(course.views), v2.PILToTensor()])
    files = ImageFolder(str(folder), transform=transform)
    order = torch.utils.data.RandomSampler(files, replacement=True, num_samples=course.samples + course.batch)
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


def _prepare_loader(course: Course, source: Any, *, workers: int, sampler: Any = None) -> Run:
    loader: Iterable[Any] = DataLoader(
        source, batch_size=course.batch, num_workers=workers, sampler=sampler, persistent_workers=False
    )

    def run() -> int:
        batches = iter(loader)
        samples = 0
        for batch in islice(batches, course.samples // course.batch):
            samples += len(batch[0] if isinstance(batch, list) else batch)
        del batches  # ends the workers, whose CPU time is counted when they have ended
        return samples

    return run


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
