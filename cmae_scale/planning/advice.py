"""What stops a run before it costs anything, and what looks inconsistent: a sentence and a remedy each."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from cmae_scale.checkpoints.commit import has_begun
from cmae_scale.config.batches import BatchSizes, plan_batch
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.config.precision import FormatName
from cmae_scale.config.run_file import Run, resolve_run
from cmae_scale.config.schedules import Timetable, plan_timetable
from cmae_scale.config.transfer import TransferConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.locations import read_scheme
from cmae_scale.data.mix import plan_data
from cmae_scale.data.shard_set import find_monitored, open_labelled, open_shards
from cmae_scale.planning.layouts import Layout
from cmae_scale.sizing.flops import count_kept
from cmae_scale.sizing.parameters import count_parameters
from cmae_scale.sizing.zero import Job

FEW_KEYS = 1024  # Source: MoCo v3 (arXiv:2104.02057) table 1 starts here; the paper's own batch is 4096
FEW_STEPS = 10  # an epoch should have; a data set that is too small for larger batches is left alone
FEW_NORMED = 32  # images that a BatchNorm's statistics should come from at least
LEAST_SEEN = 0.1  # share of patches. Source: MAE figure 5: accuracy falls beyond nine tenths hidden
BUCKET = 50_000_000  # numbers in a buffer for gradients: 100 to 200 MB, as long as a message has to be
LR_RANGE = (
    1e-5,
    1e-2,
)  # of AdamW's peak on these models. Source: MAE 2.4e-3, MoCo v3 2.4e-3, quickstart 1e-3


def find_faults(
    run: Run,
    *,
    job: Job,
    times: Timetable,
    layouts: list[Layout],
    own: Layout,
    machine_format: FormatName,
) -> list[str]:
    """All warnings; `run` is resolved, `own` is its own choice among `layouts`."""
    faults = find_run_faults(run, batch=job.batch, ranks=job.zero.ranks, times=times)
    faults += _precision_faults(job, machine_format)
    return [*faults, *_memory_faults(job, layouts=layouts, own=own)]


def find_run_faults(run: Run, *, batch: BatchSizes, ranks: int, times: Timetable) -> list[str]:
    """The warnings that hold on whatever machine; `run` is resolved."""
    faults = list(_schedule_faults(run, times=times))
    if run.kind == "cmae":
        images = times.steps_per_epoch * batch.total
        faults += _method_faults(run, steps=times.total_steps)
        faults += _batch_faults(run, batch=batch, ranks=ranks, images=images)
    return faults


def _schedule_faults(run: Run, *, times: Timetable) -> Iterator[str]:
    cfg, steps = run.settings, times.total_steps
    if times.warmup_steps >= steps:
        yield (
            f"{run.kind}.schedule.warmup {cfg.schedule.warmup} is {times.warmup_steps} steps, the run has "
            f"{steps}: the peak learning rate is never reached; write a shorter one, such as 10%"
        )
    if times.save_every_steps > steps:
        yield (
            f"{run.kind}.checkpoint.every {cfg.checkpoint.every} is {times.save_every_steps} steps, the run "
            f"has {steps}: only its end is saved; write for instance 5%"
        )


def _method_faults(run: Run, *, steps: int) -> Iterator[str]:
    cfg, momentum = run.cmae, run.cmae.target.momentum
    if cfg.has_contrast and steps * (1 - momentum) < 1:
        less = f"write at most {1 - 10 / steps:.3g}, or " if steps > 20 else ""
        memory = "forever" if momentum == 1 else f"for 1 / (1 - {momentum}) = {1 / (1 - momentum):.0f} steps"
        yield (
            f"cmae.target.momentum {momentum} remembers {memory}, the run has {steps}: the target stays near "
            f"its random start; {less}train longer"
        )
    low, high = LR_RANGE
    if not low <= run.peak_lr <= high:
        yield (
            f"the peak learning rate {run.peak_lr:.2g} is outside of {low:g} to {high:g}, where such models "
            f"train: change cmae.schedule.base_lr ({cfg.schedule.base_lr:g} per 256 images) or lr"
        )


def _batch_faults(run: Run, *, batch: BatchSizes, ranks: int, images: int) -> Iterator[str]:
    cfg, can_be_larger = run.cmae, images >= FEW_KEYS * FEW_STEPS
    if cfg.has_contrast and cfg.loss.contrast == "infonce" and batch.total < FEW_KEYS and can_be_larger:
        yield (
            f"train_batch_size {batch.total} gives InfoNCE {batch.total - 1} negatives (paper: 4095): raise "
            "it (accumulation counts fully), or write cmae.loss.contrast=byol, which needs none"
        )
    together = batch.micro * ranks
    if cfg.has_contrast and cfg.heads.norm == "sync_batch" and together < min(FEW_NORMED, batch.total):
        yield (
            f"the heads' BatchNorm sees {together} images at a time ({batch.micro} x {ranks} ranks): raise "
            "train_micro_batch_size_per_gpu, or write cmae.heads.norm=layer"
        )
    grid = cfg.views.img_px // cfg.model.patch_size
    kept = count_kept(grid, cell=cfg.mask.cell, ratio=cfg.mask.ratio)
    if kept < LEAST_SEEN * grid**2:
        yield (f"cmae.mask.ratio {cfg.mask.ratio} leaves the encoder {kept} of {grid**2} patches: write 0.65")


def _memory_faults(job: Job, *, layouts: list[Layout], own: Layout) -> Iterator[str]:
    trained, bucket = count_parameters(job.cfg).trained, job.zero.reduce_bucket
    if job.device == "cuda" and bucket > trained and own.peak.buckets > 0.5 * 2**30:
        yield (
            f"the buffers that gradients are sent in take {own.peak.buckets / 2**30:.1f} GiB, more than "
            f"the gradients: write zero_optimization.reduce_bucket_size={min(BUCKET, trained)}"
        )
    if own.fits:
        return
    if own.largest is not None:
        yield (
            f"{own.device_bytes / 2**30:.1f} GiB do not fit: write train_micro_batch_size_per_gpu="
            f"{own.largest.micro} with gradient_accumulation_steps={own.largest.accumulation}"
        )
    elif not any(layout.largest for layout in layouts):
        yield "no choice fits, not even one image at a time: take more or larger GPUs, or offload_optimizer"
    else:
        yield "not even one image fits like this: take the recommended stage and rematerialisation"


def _precision_faults(job: Job, machine_format: FormatName) -> Iterator[str]:
    named = job.formats.compute
    if named == "bfloat16" and machine_format == "float16":
        yield (
            "the run file names bfloat16, which this GPU does not have in hardware: write "
            "torch_autocast.enabled=auto torch_autocast.dtype=auto"
        )


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
        train, val = find_monitored(cfg)
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
