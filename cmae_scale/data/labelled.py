"""Labelled shards to learn from and to be judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

from cmae_scale.config.cmae import CmaeConfig, DataConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.data.classes import tell_apart
from cmae_scale.data.shard_set import ShardSet, open_shards


@dataclass(frozen=True)
class Labelled:
    """Training and validation shards with the same classes."""

    train: ShardSet
    val: ShardSet
    classes: tuple[str, ...]


def open_labelled(
    train: str | Sequence[str], val: str | Sequence[str], *, data: DataConfig, measure: bool = True
) -> Labelled:
    """Both sets. Raises DataError where classes are missing or differ. `measure` is that of `open_shards`."""
    shards, val_shards = (open_shards(places, data=data, measure=measure) for places in (train, val))
    if not shards.classes:
        raise DataError(
            f"{shards.describe()} has no classes: make its shards with --source imagefolder from a folder of "
            "class folders"
        )
    if shards.classes != val_shards.classes:
        raise DataError(
            f"{val_shards.describe()} has other classes than {shards.describe()} "
            f"({tell_apart(val_shards.classes or (), shards.classes)}): make it again with --classes and the "
            "folder of the training shards"
        )
    return Labelled(shards, val_shards, shards.classes)


def place_monitored(cfg: CmaeConfig) -> tuple[str | tuple[str, ...], str | tuple[str, ...]]:
    """Where the kNN monitor's voting and held-out shards are. ConfigError where nothing is held out."""
    knn = cfg.monitor.knn
    assert knn is not None
    val = knn.val_shards or cfg.data.val_shards
    if val is None:
        raise ConfigError("cmae.monitor.knn needs held-out images: write its val_shards, or data.val_shards")
    return knn.shards or cfg.data.shards, val
