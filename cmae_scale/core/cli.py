"""What all commands share: their common arguments, and how an error reaches its user."""

import argparse
import errno
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import NoReturn

from cmae_scale.core.credentials import mask
from cmae_scale.core.errors import ConfigError, UserError
from cmae_scale.core.terminal import tell
from cmae_scale.core.world import read_world

_COUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(\.\d+)?([kMG]?)", re.IGNORECASE | re.ASCII)
_MANY = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """What it says of wrong arguments is masked, for they may hold secrets."""

    def error(self, message: str) -> NoReturn:
        """Leave with argparse's own status."""
        self.print_usage(sys.stderr)
        tell(f"{self.prog}: error: {message}", to=sys.stderr)
        raise SystemExit(UserError.exit_status)


def build_parser(description: str, *, examples: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every command that runs a run file."""
    parser = Parser(
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--deepspeed_config", required=True, metavar="FILE", help="the run file (ds_configs/*.json)"
    )
    add_overrides(parser, help="override settings of the run file (docs/settings.md), e.g. cmae.seed=1")
    parser.add_argument("--out", metavar="DIR", help="run folder (as the setting out)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument(
        "--deepspeed", action="store_true", help=argparse.SUPPRESS
    )  # habit of DeepSpeed users
    return parser


def add_overrides(parser: argparse.ArgumentParser, *, help: str) -> None:
    """The option --set, which may come several times and takes several overrides each time."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=help)


def read_overrides(args: argparse.Namespace, *, kind: str = "cmae") -> list[str]:
    """The `--set` overrides, with `--out` as the last of them; `kind` is the name of our object."""
    return [*args.set, *([f"{kind}.out={json.dumps(args.out)}"] if args.out else [])]


def read_count(text: str) -> int:
    """A whole number above 0 as people write it: 1281167, 1_281_167, 1,281,167, 1.28M. Else ConfigError."""
    match = _COUNT.fullmatch(text.strip())
    number = Decimal(0)
    if match is not None:
        digits = match[1].replace(",", "").replace("_", "") + (match[2] or "")
        number = Decimal(digits) * _MANY[match[3].lower()]
    if number < 1 or number % 1:
        raise ConfigError(f'"{text}" is no count: write a whole number such as 1281167, 1_281_167 or 1.28M')
    return int(number)


def run_command(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Exit status of `command`: 0, 130 for Ctrl-C, or a user's mistake's, said in one sentence on stderr."""
    given = sys.argv[1:] if argv is None else list(argv)
    sys.argv[1:] = map(mask, sys.argv[1:])  # wandb, for one, writes down how its process was started
    try:
        command(given)
    except UserError as error:
        world = read_world()
        if world.is_first or not error.is_everywhere:
            prefix = "error" if error.is_everywhere or world.size == 1 else f"error on rank {world.rank}"
            tell(f"{prefix}: {error}", to=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in _DISK_ERRORS and error.filename is None:
            return _tell_traceback()
        remedy = "make room" if error.errno in _DISK_ERRORS else "look at that place"
        tell(f"error: {error}: {remedy} and start the same command again", to=sys.stderr)
        return UserError.exit_status
    except KeyboardInterrupt:
        return 130
    except Exception:
        return _tell_traceback()
    return 0


def _tell_traceback() -> int:
    """The status of a mistake of ours, whose traceback may hold an address with a secret as any text may."""
    tell(traceback.format_exc().rstrip(), to=sys.stderr)
    return 1
