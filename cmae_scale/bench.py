"""Measure what the project claims, beside the alternatives, and keep the figures as a record."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder is first on sys.path, the repository should be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cmae_scale.benchmarks.arguments import build_bench_parser
from cmae_scale.benchmarks.commands import TRIALS
from cmae_scale.core.cli import run_command
from cmae_scale.core.world import wait_without_spinning

EXAMPLES = """\
  python -m cmae_scale.bench loader --shards shards/train --folder images/train
  python -m cmae_scale.bench stream --shards shards/train
  python -m cmae_scale.bench shards --folder images/train
  python -m cmae_scale.bench memory
  python -m cmae_scale.bench hybrid --deepspeed_config ds_configs/convvitb.json
  python -m cmae_scale.bench kill --deepspeed_config ds_configs/quickstart.json --kills 30
  python -m cmae_scale.bench gpu --quick
  python -m cmae_scale.bench parts --only ema tar"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    return run_command(bench, argv)


def bench(argv: Sequence[str] | None) -> None:
    """Read the arguments and do what the first of them says."""
    args = build_bench_parser(__doc__.splitlines()[0], examples=EXAMPLES).parse_args(argv)
    wait_without_spinning()
    TRIALS[args.trial](args)


if __name__ == "__main__":
    sys.exit(main())
