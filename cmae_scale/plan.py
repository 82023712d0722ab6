"""Say what a run will be and cost before it starts: its parts, steps, hours, and what fits which GPU."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.core.cli import build_parser, read_count, read_overrides, run_command
from cmae_scale.core.errors import ConfigError, DataError
from cmae_scale.core.terminal import tell

if TYPE_CHECKING:
    from cmae_scale.config.run_file import Run
    from cmae_scale.planning.forecast import Machine

EXAMPLES = """\
  python -m cmae_scale.plan --deepspeed_config ds_configs/vitl.json --images 1.28M --gpu H200 --gpus 8
  python -m cmae_scale.plan --deepspeed_config ds_configs/vith.json --images 1281167 --gpu A100-40GB \\
      --gpus 32 --set zero_optimization.stage=3 cmae.model.remat=full --mfu 0.3 --price 2.5
  python -m cmae_scale.plan --deepspeed_config ds_configs/vitb.json --gpu A10G --memory_gib 22 --tflops 70
  python -m cmae_scale.plan --deepspeed_config ds_configs/quickstart.json --gpu cpu --json"""
DEFAULT_GPU = "H100"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(plan, argv)


def plan(argv: Sequence[str] | None) -> None:
    """Read the run as training would read it, and print what follows, without torch and without a GPU."""
    args = read_arguments(argv)

    from cmae_scale.config.batches import plan_batch
    from cmae_scale.config.run_file import read_run, resolve_run
    from cmae_scale.config.schedules import plan_timetable
    from cmae_scale.planning.estimate import DEFAULT_MFU
    from cmae_scale.planning.forecast import forecast, to_json
    from cmae_scale.planning.page import write_page

    run = read_run(args.deepspeed_config, read_overrides(args))
    machine = choose_machine(args)
    batch = plan_batch(run.deepspeed, ranks=machine.ranks)
    images, steps_per_epoch = count_images(run, batch=batch.total, given=args.images)
    times = plan_timetable(run.cmae, steps_per_epoch=steps_per_epoch, batch_samples=batch.total)
    run = resolve_run(run, batch=batch, total_steps=times.total_steps, warmup_steps=times.warmup_steps)
    found = forecast(
        run,
        machine=machine,
        dataset_images=images,
        batch=batch,
        times=times,
        mfu=args.mfu or DEFAULT_MFU,
        price=args.price,
    )
    tell(json.dumps(to_json(found), indent=2) if args.json else write_page(found))


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, each in its range."""
    parser = build_parser(__doc__.splitlines()[0], examples=EXAMPLES)
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks (default: the GPUs here, else 1)")
    parser.add_argument("--gpu", metavar="NAME", help=f'or "cpu" (default: the one here, else {DEFAULT_GPU})')
    parser.add_argument("--memory_gib", type=float, help="of one GPU (default: as listed for its name)")
    parser.add_argument("--tflops", type=float, help="of one GPU: dense matrix products in two bytes")
    parser.add_argument(
        "--images",
        type=read_count,
        metavar="N",
        help="data set size, such as 1281167 or 1.28M (default: as the shards say)",
    )
    parser.add_argument("--mfu", type=float, help="share of the GPU's peak that training reaches")
    parser.add_argument("--price", type=float, help="of one GPU-hour, in any currency")
    parser.add_argument("--json", action="store_true", help="all numbers, with their units, as JSON")
    args = parser.parse_args(argv)
    for name in ("gpus", "memory_gib", "tflops", "mfu", "price"):
        value = getattr(args, name)
        if value is not None and (value <= 0 or (name == "mfu" and value > 1)):
            raise ConfigError(f"--{name} {value}: write a number above 0{' and at most 1' * (name == 'mfu')}")
    return args


def choose_machine(args: argparse.Namespace) -> "Machine":
    """The devices that were named or described, or those of this machine, or one of the default."""
    from cmae_scale.planning.forecast import Machine, name_machine
    from cmae_scale.sizing.hardware import Gpu, find_gpu, find_local_gpus, name_cpus_half

    name, ranks = args.gpu, args.gpus or 1
    if name is not None and name.lower() == "cpu":
        memory_gib = args.memory_gib or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        machine = Machine("cpu", "cpu", ranks, memory_gib / ranks, None, name_cpus_half())
    elif args.memory_gib and args.tflops:
        machine = name_machine(Gpu(name or "GPU", None, args.memory_gib), ranks=ranks)
    elif name is None and (local := find_local_gpus()) is not None:
        machine = name_machine(local.gpu, ranks=args.gpus or local.number)
    else:
        machine = name_machine(find_gpu(name or DEFAULT_GPU), ranks=ranks)
    if args.tflops:
        machine = machine._replace(flops=args.tflops * 1e12)
    if args.memory_gib and machine.device == "cuda":
        machine = machine._replace(memory_gib=args.memory_gib)
    return machine


def count_images(run: "Run", *, batch: int, given: int | None) -> tuple[int, int]:
    """Images of the data set and steps of an epoch: from the number given, or from the shards' index."""
    from cmae_scale.data.mix import plan_data
    from cmae_scale.data.shard_set import open_shards

    if given is not None:
        if given < batch:
            raise ConfigError(f"--images {given} is fewer than train_batch_size ({batch}): lower that")
        return given, given // batch
    data = run.cmae.data
    try:
        shards = open_shards(data.shards, data=data)
    except DataError as error:
        raise DataError(f"{error}; or give --images N") from None
    return shards.total, plan_data(shards, data, global_batch=batch, seed=run.cmae.seed).steps_per_epoch


if __name__ == "__main__":
    sys.exit(main())
