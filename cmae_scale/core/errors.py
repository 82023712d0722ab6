"""Mistakes that a user can mend: each carries one sentence that names the place and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside the program is wrong; its text goes to stderr as it is, without a traceback.

    `is_everywhere`: all ranks see the same error, so that one of them says it for all.
    """

    exit_status = 2  # as argparse has it
    is_everywhere = False


class ConfigError(UserError):
    """The run file, an override or an argument cannot be used."""

    is_everywhere = True


class DataError(UserError):
    """A shard, an index or an image is missing, damaged or not what its index says."""


class DivergedError(UserError):
    """Steps go wrong: losses or gradients are no longer finite numbers, or the loss jumps."""

    exit_status = 1
    is_everywhere = True


def nearest(name: str, known: Iterable[str]) -> str:
    """A ready "; did you mean 'x'?" for `name`, or "" when nothing in `known` is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
