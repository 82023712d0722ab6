"""What each trial of bench does: measure, print for people, keep as a record.

Imports stand in the functions: a trial should not wait for the libraries of another.
"""

import argparse
import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cmae_scale.config.cmae import DataConfig, ViewsConfig
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.terminal import tell

if TYPE_CHECKING:
    from cmae_scale.sizing.zero import Device


def measure_loader(args: argparse.Namespace) -> None:
    """Print and record what a sample costs, for us and for others, and how they compare."""
    from cmae_scale.benchmarks.loader_memory import measure_footprint
    from cmae_scale.benchmarks.loaders import OURS, Contender, benchmark, describe_benchmark, record_benchmark
    from cmae_scale.data.shard_set import open_shards
    from cmae_scale.report.records import write_record

    data = DataConfig(shards=tuple(args.shards), workers=args.workers)
    shards = open_shards(data.shards, data=data)
    views = read_views(args)
    course = Contender(
        shards, args.folder, views, workers=args.workers, batch=args.batch, samples=args.samples
    )
    timings = benchmark(course, rounds=args.rounds)
    tell(describe_benchmark(timings))
    results: dict[str, dict[str, object]] = record_benchmark(timings)
    memory = measure_footprint(data, views=views, batch=args.batch, epochs=args.epochs)
    tell(f"resident memory after each epoch, MiB: {' '.join(f'{mib:.0f}' for mib in memory)}")
    results[OURS]["resident_mib"] = memory
    config = {
        "samples": args.samples,
        "batch": args.batch,
        "workers": args.workers,
        "master_px": args.master_px,
        "images": shards.total,
    }
    write_record(args.record, config=config, results=results)
    tell(f"record {args.record}")


def prove_stream(args: argparse.Namespace) -> None:
    """Print a digest of every epoch's global batches for each world. DataError unless all are equal."""
    from cmae_scale.benchmarks.proof import WORLDS, digest_worlds
    from cmae_scale.data.mix import plan_data
    from cmae_scale.data.shard_set import open_shards

    data = DataConfig(shards=tuple(args.shards))
    if args.batch % 4:
        raise ConfigError(f"--batch {args.batch} cannot be shared by 4 ranks: write a multiple of 4")
    shards = open_shards(data.shards, data=data)
    plan = plan_data(shards, data, global_batch=args.batch, seed=0)
    tell(
        f"{plan.total:,} samples, {plan.steps_per_epoch} steps of {plan.global_batch} an epoch, "
        f"{plan.streams} streams"
    )
    found = set()
    for world, epochs in digest_worlds(shards, plan, views=read_views(args), data=data, epochs=args.epochs):
        told = "  ".join(f"{digest} ({samples:,} samples)" for digest, samples in epochs)
        tell(f"{world}  {told}")
        found.add(epochs)
    if len(found) > 1:
        raise DataError("the global batches differ between these worlds")
    tell(f"identical in all {len(WORLDS)} worlds")


def measure_shards(args: argparse.Namespace) -> None:
    """Print and record what it costs to put an image into a shard."""
    from cmae_scale.benchmarks.shards import benchmark_shards, describe_shard_benchmark
    from cmae_scale.report.records import summarise_timings, write_record
    from data_prep.make_shards import main as make_shards

    def make(out: Path) -> None:
        options = ["--root", str(args.folder), "--out", str(out), "--processes", "1"]
        with redirect_stdout(io.StringIO()):
            make_shards(["--source", "imagefolder", *options])

    files = sorted(path for path in args.folder.glob("*/*") if path.is_file())
    if not files:
        raise ConfigError(f"--folder {args.folder} holds no class folders with files")
    mb = sum(path.stat().st_size for path in files) / 1e6 / len(files)
    timings = benchmark_shards(files, make=make, scratch=args.scratch, rounds=args.rounds)
    tell(describe_shard_benchmark(timings, images=len(files), mb_per_image=mb))
    results = {name: summarise_timings(runs, per="image") for name, runs in timings.items()}
    write_record(args.record, config={"images": len(files), "mb_per_image": mb}, results=results)
    tell(f"record {args.record}")


def measure_memory(args: argparse.Namespace) -> None:
    """Print and record what real steps take here, on the CPU if there is no GPU, and what was predicted."""
    import torch

    from cmae_scale.benchmarks.peak_memory import CASES, STEPS, compare_footprints
    from cmae_scale.report.records import write_record

    device: "Device" = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for number, case in enumerate(CASES, start=1) if not args.only or number in args.only]
    results = {}
    tell(f"{'run':112} {'measured':>9} {'predicted':>9}   MiB")
    for found in compare_footprints(cases, device=device):
        measured, predicted = found.measured_bytes / 2**20, found.predicted.total_bytes / 2**20
        tell(f"{found.case.name:112} {measured:9.0f} {predicted:9.0f}  {found.deviation:+.1%}")
        results[found.case.name] = found.record()
    write_record(args.record, config={"steps": STEPS, "device": device}, results=results)
    tell(f"record {args.record}")


def measure_hybrid(args: argparse.Namespace) -> None:
    """Print and record what leaving hidden patches out saves the hybrid encoder."""
    import torch

    from cmae_scale.benchmarks.hybrid import KEPT, WHOLE, benchmark_encoders
    from cmae_scale.config.run_file import read_run
    from cmae_scale.config.sizes import read_size
    from cmae_scale.engine.precision import Product, read_precision, settle_precision
    from cmae_scale.report.records import summarise_timings, write_record

    run = read_run(args.deepspeed_config, args.set)
    cfg, width = run.cmae, read_size(run.cmae.model).embed_dim
    if not cfg.model.is_hybrid:
        raise ConfigError(f"{args.deepspeed_config} has no hybrid encoder: give ds_configs/convvitb.json")
    product = Product(args.batch * (cfg.views.img_px // cfg.model.patch_size) ** 2, width, 4 * width)
    run, told = settle_precision(run, device=torch.device("cpu"), product=product)
    tell("\n".join(told))
    compute = read_precision(run.deepspeed).compute
    timings = benchmark_encoders(cfg, compute=compute, batch=args.batch, rounds=args.rounds)
    lowest = {name: min(timing.wall_s for timing in runs) for name, runs in timings.items()}
    for name, wall_s in lowest.items():
        tell(f"{name:12} {1e3 * wall_s:8.1f} ms an image, forward and backward, lowest of {args.rounds}")
    tell(f"the same tokens from kept sites alone {lowest[WHOLE] / lowest[KEPT]:.2f} times as fast")
    results = {name: summarise_timings(runs, per="image") for name, runs in timings.items()}
    config = {"model": cfg.model.encoder, "mask_ratio": cfg.mask.ratio, "batch": args.batch}
    config["products"] = str(compute)
    write_record(args.record, config=config, results=results)
    tell(f"record {args.record}")


def run_crash_test(args: argparse.Namespace) -> None:
    """Print what each kill -9 did. DataError unless every run ends as the one that was never killed."""
    from cmae_scale.benchmarks.crashes import Job, prove_survival

    # named, because a run that was killed before its first state would try kernels again
    overrides = ("--set", "cmae.model.attention=explicit", *args.set)
    arguments = ("--deepspeed_config", args.deepspeed_config, *overrides)
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job("cmae_scale.pretrain", arguments, args.ranks, args.out / "kill")
    outcomes = prove_survival(job, kills=args.kills, seed=args.seed, tell=tell)
    saving = sum(outcome.was_saving for outcome in outcomes)
    whole = sum(outcome.kill.victim is None for outcome in outcomes)
    tell(
        f"{len(outcomes)} kills (-9): {whole} of the whole run, {len(outcomes) - whole} of one rank, "
        f"{saving} during a save; every run ended with the metrics and weights of the one never killed"
    )


def measure_gpu(args: argparse.Namespace) -> None:
    """Print and record part after part of what a GPU does; what the record has already stays."""
    os.environ["DS_ACCELERATOR"] = args.device  # before DeepSpeed is imported
    from cmae_scale.benchmarks.goals import judge
    from cmae_scale.benchmarks.gpu import measure_parts
    from cmae_scale.benchmarks.noise import Stage

    with TemporaryDirectory() as scratch:
        stage = Stage(args.device, is_quick=args.quick, scratch=scratch, shards=tuple(args.shards))
        results = measure_parts(stage, record=args.record, tell=tell)
    if not stage.is_rehearsal:
        tell("\n".join(map(str, judge(results))))
    tell(f"record {args.record}")


def read_views(args: argparse.Namespace) -> ViewsConfig:
    """The master crops of the paper's recipe at the side that was asked for."""
    return ViewsConfig(img_px=args.master_px, master_px=args.master_px, shift_px=0)


def measure_parts(args: argparse.Namespace) -> None:
    """Print and record parts of a step beside the usual way to write them."""
    import torch

    from cmae_scale.benchmarks import parts
    from cmae_scale.report.records import summarise_timings, write_record

    timings = parts.measure_parts(args.only or list(parts.PARTS), rounds=args.rounds, tell=tell)
    results = {
        name: {way: summarise_timings(runs, per="unit") for way, runs in ways.items()}
        for name, ways in timings.items()
    }
    config = {"threads": 1, "cpu": torch.backends.cpu.get_cpu_capability()}
    write_record(args.record, config=config, results=results)
    tell(f"record {args.record}")


TRIALS = {
    "loader": measure_loader,
    "stream": prove_stream,
    "shards": measure_shards,
    "memory": measure_memory,
    "hybrid": measure_hybrid,
    "kill": run_crash_test,
    "gpu": measure_gpu,
    "parts": measure_parts,
}
