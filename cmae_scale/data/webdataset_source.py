"""Our exact order of samples as the source of people's own webdataset pipelines."""

import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from cmae_scale.config.cmae import DataConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.blocks import StoredSample, read_raw_batches
from cmae_scale.data.image_formats import image_extension
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import open_shards
from cmae_scale.data.tar import LABEL_ENDING

ENDLESS = 1 << 62  # steps


class ExactSource(IterableDataset[dict[str, Any]]):
    """Samples as webdataset has them: "__key__", "__url__", the image's bytes by its ending, and "cls".

    They come without end, epoch after epoch, in the order of pre-training: every sample of an epoch once but
    for the last part of a batch, whatever the number of ranks, from any sample on, and any damage of a shard
    is a DataError instead of a shorter epoch. The first stage of a `webdataset.DataPipeline`, or to be
    iterated over as it is. One process reads for a rank: ConfigError in one of several DataLoader workers.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        first_sample: int = 0,
        data: DataConfig | None = None,
    ) -> None:
        """`batch` is the global batch, a multiple of `ranks`; `first_sample` counts this rank's samples.

        `data` holds further settings of the stream: shuffle window, parallel cursors, mix, remote reading.
        """
        if batch % ranks:
            raise ConfigError(f"batch {batch} cannot be spread evenly over {ranks} ranks")
        entries = shards if isinstance(shards, str) else tuple(shards)
        settings = (data or DataConfig(shards=entries)).model_copy(update={"shards": entries})
        self.shards = open_shards(entries, data=settings)
        self.plan = plan_data(self.shards, settings, global_batch=batch, seed=seed)
        self.rank, self.ranks, self.first_sample = rank, ranks, first_sample

    @property
    def epoch_samples(self) -> int:
        """Samples that a rank sees in an epoch."""
        return self.plan.steps_per_epoch * self.plan.global_batch // self.ranks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This rank's samples from `first_sample` on."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError("each of several workers would read every sample: write num_workers=1, or 0")
        step, skipped = divmod(self.first_sample, self.plan.global_batch // self.ranks)
        batches = read_raw_batches(
            self.shards,
            self.plan,
            rank=self.rank,
            ranks=self.ranks,
            accumulation=1,
            steps=range(step, ENDLESS),
            stop=threading.Event(),
        )
        rows = (row for batch in batches for row in batch.rows)
        for row in islice(rows, skipped, None):
            yield _as_sample(next(row.block.candidates(row.slot, distance=self.plan.stream_rows)))


def _as_sample(stored: StoredSample) -> dict[str, Any]:
    url, _, key = stored.key.rpartition("/")
    ending = image_extension(stored.image) or "bin"  # of bytes that are no image
    sample: dict[str, Any] = {"__key__": key, "__url__": url, ending: stored.image}
    if stored.label is not None:
        sample[LABEL_ENDING] = str(stored.label).encode()
    return sample
