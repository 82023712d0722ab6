"""That what is read depends on the plan alone: a digest of all global batches, for any world."""

import hashlib
from collections.abc import Iterator

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.data.decoding import BadSamples
from cmae_scale.data.mix import MixPlan
from cmae_scale.data.shard_set import ShardSet
from cmae_scale.data.stream import CropBatch, open_batches

WORLDS = [(ranks, workers) for ranks in (1, 2, 4) for workers in (1, 2, 3)]


def digest_epochs(
    shards: ShardSet, plan: MixPlan, *, views: ViewsConfig, data: DataConfig, ranks: int, epochs: int
) -> Iterator[tuple[str, int]]:
    """For each epoch a SHA-256 of its global batches in order, pixels, labels and keys, and how many samples.

    All ranks are played in this process, each with threads of its own.
    """
    steps = epochs * plan.steps_per_epoch
    streams = [
        open_batches(
            shards,
            plan,
            views=views,
            data=data,
            rank=rank,
            ranks=ranks,
            accumulation=1,
            first_step=0,
            end_step=steps,
            pin=False,
            bad=BadSamples(data.max_bad_fraction),
        )
        for rank in range(ranks)
    ]
    try:
        for _ in range(epochs):
            digest = hashlib.sha256()
            keys: set[str] = set()
            for _ in range(plan.steps_per_epoch):
                for stream in streams:
                    batch = next(stream)
                    for row in _read_rows(batch):
                        digest.update(row)
                    keys.update(batch.keys)
            yield digest.hexdigest()[:16], len(keys)
    finally:
        for stream in streams:
            stream.close()


def _read_rows(batch: CropBatch) -> Iterator[bytes]:
    for image, label, key in zip(batch.images.numpy(), batch.labels.tolist(), batch.keys, strict=True):
        yield image.tobytes() + f"{label} {key}\n".encode()


def digest_worlds(
    shards: ShardSet,
    plan: MixPlan,
    *,
    views: ViewsConfig,
    data: DataConfig,
    epochs: int,
) -> Iterator[tuple[str, tuple[tuple[str, int], ...]]]:
    """The name of each of WORLDS, ranks and loader threads, and what `digest_epochs` gives there."""
    for ranks, workers in WORLDS:
        threads = data.model_copy(update={"workers": workers})
        digests = digest_epochs(shards, plan, views=views, data=threads, ranks=ranks, epochs=epochs)
        yield f"{ranks} ranks x {workers} workers", tuple(digests)
