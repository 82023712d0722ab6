"""Measure what the project claims, beside the alternatives, and keep the figures as a record."""

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.settings import DataConfig, ViewsConfig

EXAMPLES = """\
  python -m cmae_scale.bench loader --shards shards/train --folder images/train
  python -m cmae_scale.bench stream --shards shards/train
  python -m cmae_scale.bench shards --folder images/train"""
RECORDS = Path("tests/bench/records")
WORLDS = [(ranks, workers) for ranks in (1, 2, 4) for workers in (1, 2, 3)]


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
    commands = parser.add_subparsers(required=True, metavar="loader | stream | shards")
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
    shards = commands.add_parser("shards", help="seconds per image of make_shards, of decoding, of copying")
    shards.set_defaults(run=measure_shards)
    shards.add_argument("--folder", type=Path, required=True, metavar="DIR", help="images as class folders")
    shards.add_argument("--scratch", type=Path, metavar="DIR", help="disk to write to (default: temporary)")
    shards.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    shards.add_argument("--record", type=Path, default=RECORDS / "shards.json", metavar="FILE")
    args = parser.parse_args(argv)
    args.run(args)


def measure_loader(args: argparse.Namespace) -> None:
    """Print and record what a sample costs, for us and for others, and how they compare."""
    from cmae_scale.data.footprint import measure_footprint
    from cmae_scale.data.races import BARE, BARE_THREADS, OURS, Course, race
    from cmae_scale.data.shard_set import open_shards
    from cmae_scale.report.records import summarise_laps, write_record

    data = DataConfig(shards=tuple(args.shards), workers=args.workers)
    shards = open_shards(data.shards, data=data)
    views = read_views(args)
    course = Course(shards, args.folder, views, workers=args.workers, batch=args.batch, samples=args.samples)
    laps = race(course, rounds=args.rounds)
    results: dict[str, dict[str, object]] = {}
    limits = {name: min(lap.cpu_s for lap in laps[name]) for name in (BARE, BARE_THREADS) if name in laps}
    ours = min(lap.cpu_s for lap in laps[OURS])
    title = f"CPU time per sample, lowest of {args.rounds}"
    print(f"{title:40} {'ms':>7} {'per core':>9} {'/ ours':>8}")
    for name, runs in laps.items():
        lowest = min(lap.cpu_s for lap in runs)
        print(f"{name:40} {1e3 * lowest:7.3f} {1 / lowest:7.0f}/s {lowest / ours:7.2f}x")
        results[name] = {**summarise_laps(runs, per="sample"), "times_ours": lowest / ours}
    for name, limit in limits.items():
        print(f"share of {name}: {limit / ours:.2f}")
    memory = measure_footprint(data, views=views, batch=args.batch, epochs=args.epochs)
    print(f"resident memory after each epoch, MiB: {' '.join(f'{mib:.0f}' for mib in memory)}")
    results[OURS]["resident_mib"] = memory
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
    from cmae_scale.data.proof import digest_epochs
    from cmae_scale.data.shard_set import open_shards

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
    for ranks, workers in WORLDS:
        data = DataConfig(shards=data.shards, workers=workers)
        epochs = list(
            digest_epochs(shards, plan, views=read_views(args), data=data, ranks=ranks, epochs=args.epochs)
        )
        digests = "  ".join(f"{digest} ({samples:,} samples)" for digest, samples in epochs)
        print(f"{ranks} ranks x {workers} workers  {digests}", flush=True)
        found.add(tuple(epochs))
    if len(found) > 1:
        raise DataError("the global batches differ between these worlds")
    print(f"identical in all {len(WORLDS)} worlds")


def measure_shards(args: argparse.Namespace) -> None:
    """Print and record what it costs to put an image into a shard."""
    from cmae_scale.data.shard_races import DECODE, MAKE, race_shards
    from cmae_scale.report.records import summarise_laps, write_record
    from data_prep.make_shards import main as make_shards

    def make(out: Path) -> None:
        options = ["--root", str(args.folder), "--out", str(out), "--processes", "1"]
        with redirect_stdout(io.StringIO()):
            make_shards(["--source", "imagefolder", *options])

    files = sorted(path for path in args.folder.glob("*/*") if path.is_file())
    if not files:
        raise ConfigError(f"--folder {args.folder} holds no class folders with files")
    mb = sum(path.stat().st_size for path in files) / 1e6 / len(files)
    laps = race_shards(files, make=make, scratch=args.scratch, rounds=args.rounds)
    title = f"lowest of {args.rounds}"
    print(f"{title:14} {'CPU ms':>8} {'ms':>8} {'MB/s':>8}   for each of {len(files):,} images")
    for name, runs in laps.items():
        cpu_s, wall_s = (min(getattr(lap, kind) for lap in runs) for kind in ("cpu_s", "wall_s"))
        print(f"{name:14} {1e3 * cpu_s:8.3f} {1e3 * wall_s:8.3f} {mb / wall_s:8.1f}")
    lowest = {name: min(lap.wall_s for lap in runs) for name, runs in laps.items()}
    print(f"make_shards is {lowest[DECODE] / lowest[MAKE]:.1f} times as fast as decoding")
    results = {name: summarise_laps(runs, per="image") for name, runs in laps.items()}
    write_record(args.record, config={"images": len(files), "mb_per_image": mb}, results=results)
    print(f"record {args.record}")


def read_views(args: argparse.Namespace) -> ViewsConfig:
    """The master crops of the paper's recipe at the side that was asked for."""
    return ViewsConfig(img_px=args.master_px, master_px=args.master_px, shift_px=0)


if __name__ == "__main__":
    sys.exit(main())
