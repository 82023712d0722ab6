"""What all commands share: their common arguments, and how an error reaches its user."""

import argparse
import errno
import json
import sys
from collections.abc import Callable, Sequence

from cmae_scale.core.errors import UserError
from cmae_scale.core.world import read_world

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def build_parser(description: str, *, examples: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every command that runs a run file."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="the run file (ds_configs/*.json)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLACE=VALUE",
        help="override settings of the run file, e.g. cmae.mask.ratio=0.75 zero_optimization.stage=3",
    )
    parser.add_argument("--out", metavar="DIR", help="run folder (same as --set cmae.out=DIR)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "--deepspeed", action="store_true", help=argparse.SUPPRESS
    )  # habit of DeepSpeed users
    return parser


def read_overrides(args: argparse.Namespace, *, kind: str = "cmae") -> list[str]:
    """The `--set` overrides, with `--out` as the last of them; `kind` is the name of our object."""
    return [*args.set, *([f"{kind}.out={json.dumps(args.out)}"] if args.out else [])]


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Exit status of `command`: 0, 130 for Ctrl-C, or a user's mistake's, said in one sentence on stderr."""
    try:
        command(argv)
    except UserError as error:
        world = read_world()
        if world.is_first or not error.is_everywhere:
            prefix = "error" if error.is_everywhere or world.size == 1 else f"error on rank {world.rank}"
            print(f"{prefix}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"error: {error}: make room and start the same command again", file=sys.stderr, flush=True)
        return UserError.exit_status
    except KeyboardInterrupt:
        return 130
    return 0
