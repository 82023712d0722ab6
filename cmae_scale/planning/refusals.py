"""What a run would be refused for later, told before torch takes its seconds to load.

Only the run file and the index.json files on this machine are looked at: no shard, no network, no device.
"""

from collections.abc import Sequence
from pathlib import Path

from cmae_scale.checkpoints.newest import has_begun
from cmae_scale.config.batches import BatchSizes, plan_batch
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.durations import plan_timetable
from cmae_scale.config.run_file import Run, resolve_run
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.labelled import open_labelled, place_monitored
from cmae_scale.data.mix import plan_data
from cmae_scale.data.places import read_scheme
from cmae_scale.data.shard_set import open_shards

Places = str | Sequence[str]


def check_run(run: Run, *, ranks: int) -> None:
    """Raise the ConfigError or DataError that `run` on `ranks` processes is known to end with."""
    match run.settings:
        case CmaeConfig() as cfg:
            _check_pretraining(run, cfg, batch=plan_batch(run.deepspeed, ranks=ranks))
        case TransferConfig() as cfg:
            _check_transfer(cfg)
            if cfg.task.knn is None:
                plan_batch(run.deepspeed, ranks=ranks)


def _check_transfer(cfg: TransferConfig) -> None:
    if _are_local(cfg.data.shards, cfg.data.val_shards):
        open_labelled(cfg.data.shards, cfg.data.val_shards, data=cfg.data, measure=False)
    place = cfg.encoder.place.removeprefix("local-dir:")
    if not place.startswith("timm:") and not Path(place).exists():
        raise ConfigError(f'no encoder at {place}: write a run, folder or file, or "timm:NAME"')


def _check_pretraining(run: Run, cfg: CmaeConfig, *, batch: BatchSizes) -> None:
    data, init = cfg.data, cfg.model.init
    if init is not None and not has_begun(run) and not Path(init).exists():
        raise ConfigError(
            f"cmae.model.init {init} does not exist: give a run, or a file or folder of weights"
        )
    if cfg.monitor.knn is not None:
        train, val = place_monitored(cfg)
        if _are_local(train, val):
            open_labelled(train, val, data=data, measure=False)
    if data.val_shards is not None and _are_local(data.val_shards):
        open_shards(data.val_shards, data=data, measure=False)
    if _are_local(data.shards):
        shards = open_shards(data.shards, data=data, measure=False)
        plan = plan_data(shards, data, global_batch=batch.total, seed=cfg.seed)
        times = plan_timetable(cfg, steps_per_epoch=plan.steps_per_epoch, batch_samples=batch.total)
        resolve_run(run, batch=batch, total_steps=times.total_steps, warmup_steps=times.warmup_steps)


def _are_local(*places: Places) -> bool:
    entries = [entry for place in places for entry in ([place] if isinstance(place, str) else place)]
    return not any(read_scheme(entry) for entry in entries)
