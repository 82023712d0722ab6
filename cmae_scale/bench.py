"""Measure what the project claims, beside the alternatives, and keep the figures as a record."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.settings import DataConfig, ViewsConfig

if TYPE_CHECKING:
    from cmae_scale.sizing.zero import Device

EXAMPLES = """\
  python -m cmae_scale.bench loader --shards shards/train --folder images/train
  python -m cmae_scale.bench stream --shards shards/train
  python -m cmae_scale.bench memory
  python -m cmae_scale.bench kill --deepspeed_config ds_configs/quickstart.json --kills 30"""
RECORDS = Path("tests/bench/records")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(bench, argv)


def bench(argv: Sequence[str] | None) -> None:
    """Read the arguments and do what the first of them says."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="loader | stream | memory | kill")
    loader = commands.add_parser("loader", help="CPU seconds per sample beside other loaders")
    loader.set_defaults(run=measure_loader)
    loader.add_argument("--folder", type=Path, metavar="DIR", help="the same images as class folders")
    loader.add_argument("--samples", type=int, default=1000, help="of each round (default: 1000)")
    loader.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    loader.add_argument("--workers", type=int, default=2, help="threads or processes (default: 2)")
    loader.add_argument("--epochs", type=int, default=6, help="in which memory is watched (default: 6)")
    loader.add_argument("--record", type=Path, default=RECORDS / "loader.json", metavar="FILE")
    stream = commands.add_parser("stream", help="the same global batches for every world, as digests")
    stream.set_defaults(run=prove_stream)
    stream.add_argument("--epochs", type=int, default=2, help="default: 2")
    for command in (loader, stream):
        command.add_argument("--shards", nargs="+", required=True, metavar="DIR", help="as cmae.data.shards")
        command.add_argument("--batch", type=int, default=64, help="global batch (default: 64)")
        command.add_argument("--master_px", type=int, default=256, help="side of the crops (default: 256)")
    memory = commands.add_parser("memory", help="memory of real training beside what plan predicts")
    memory.set_defaults(run=measure_memory)
    memory.add_argument("--only", type=int, nargs="+", metavar="N", help="these of the cases, from 1")
    memory.add_argument("--record", type=Path, default=RECORDS / "memory.json", metavar="FILE")
    kill = commands.add_parser("kill", help="a run killed at random moments ends as one never killed")
    kill.set_defaults(run=prove_kills)
    kill.add_argument("--deepspeed_config", required=True, metavar="FILE", help="the run file")
    kill.add_argument("--set", nargs="+", default=[], metavar="PLACE=VALUE", help="as for a run")
    kill.add_argument("--kills", type=int, default=30, help="default: 30")
    kill.add_argument("--ranks", type=int, default=2, help="processes on this machine (default: 2)")
    kill.add_argument("--seed", type=int, default=0, help="of victims and moments (default: 0)")
    kill.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="for the runs' folders")
    args = parser.parse_args(argv)
    args.run(args)


def measure_loader(args: argparse.Namespace) -> None:
    """Print and record what a sample costs, for us and for others, and how they compare."""
    from cmae_scale.data.shard_set import open_shards
    from cmae_scale.report.records import write_record
    from cmae_scale.trials.loader_memory import measure_footprint
    from cmae_scale.trials.races import Course, describe_race, race, record_race

    data = DataConfig(shards=tuple(args.shards), workers=args.workers)
    shards = open_shards(data.shards, data=data)
    views = read_views(args)
    course = Course(shards, args.folder, views, workers=args.workers, batch=args.batch, samples=args.samples)
    laps = race(course, rounds=args.rounds)
    print(describe_race(laps))
    results: dict[str, dict[str, object]] = record_race(laps)
    memory = measure_footprint(data, views=views, batch=args.batch, epochs=args.epochs)
    print(f"resident memory after each epoch, MiB: {' '.join(f'{mib:.0f}' for mib in memory)}")
    results["ours"]["resident_mib"] = memory
    config = {
        "samples": args.samples,
        "batch": args.batch,
        "workers": args.workers,
        "master_px": args.master_px,
        "images": shards.total,
    }
    write_record(args.record, config=config, results=results)
    print(f"record {args.record}")


def prove_stream(args: argparse.Namespace) -> None:
    """Print a digest of every epoch's global batches for each world. DataError unless all are equal."""
    from cmae_scale.data.mix import plan_data
    from cmae_scale.data.shard_set import open_shards
    from cmae_scale.trials.proof import WORLDS, digest_worlds

    data = DataConfig(shards=tuple(args.shards))
    if args.batch % 4:
        raise ConfigError(f"--batch {args.batch} cannot be shared by 4 ranks: write a multiple of 4")
    shards = open_shards(data.shards, data=data)
    plan = plan_data(shards, data, global_batch=args.batch, seed=0)
    print(
        f"{plan.total:,} samples, {plan.steps_per_epoch} steps of {plan.global_batch} an epoch, "
        f"{plan.streams} streams"
    )
    found = set()
    for world, epochs in digest_worlds(shards, plan, views=read_views(args), data=data, epochs=args.epochs):
        told = "  ".join(f"{digest} ({samples:,} samples)" for digest, samples in epochs)
        print(f"{world}  {told}", flush=True)
        found.add(epochs)
    if len(found) > 1:
        raise DataError("the global batches differ between these worlds")
    print(f"identical in all {len(WORLDS)} worlds")


def measure_memory(args: argparse.Namespace) -> None:
    """Print and record what real steps take here, on the CPU if there is no GPU, and what was predicted."""
    import torch

    from cmae_scale.report.records import write_record
    from cmae_scale.trials.footprint import CASES, STEPS, compare_footprints

    device: "Device" = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for number, case in enumerate(CASES, start=1) if not args.only or number in args.only]
    results = {}
    print(f"{'run':112} {'measured':>9} {'predicted':>9}   MiB")
    for found in compare_footprints(cases, device=device):
        measured, predicted = found.measured_bytes / 2**20, found.predicted.total_bytes / 2**20
        print(f"{found.case.name:112} {measured:9.0f} {predicted:9.0f}  {found.deviation:+.1%}", flush=True)
        results[found.case.name] = found.record()
    write_record(args.record, config={"steps": STEPS, "device": device}, results=results)
    print(f"record {args.record}")


def prove_kills(args: argparse.Namespace) -> None:
    """Print what each kill -9 did. DataError unless every run ends as the one that was never killed."""
    from cmae_scale.trials.kills import Job, prove_survival

    overrides = ("--set", *args.set) if args.set else ()
    arguments = ("--deepspeed_config", args.deepspeed_config, *overrides)
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job("cmae_scale.pretrain", arguments, args.ranks, args.out / "kill")
    outcomes = prove_survival(job, kills=args.kills, seed=args.seed, tell=partial(print, flush=True))
    saving = sum(outcome.was_saving for outcome in outcomes)
    whole = sum(outcome.kill.victim is None for outcome in outcomes)
    print(
        f"{len(outcomes)} kills (-9): {whole} of the whole run, {len(outcomes) - whole} of one rank, "
        f"{saving} during a save; every run ended with the metrics and weights of the one never killed"
    )


def read_views(args: argparse.Namespace) -> ViewsConfig:
    """The master crops of the paper's recipe at the side that was asked for."""
    return ViewsConfig(img_px=args.master_px, master_px=args.master_px, shift_px=0)


if __name__ == "__main__":
    sys.exit(main())
