"""Mistakes that a user can mend: each carries one sentence that names the place and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something outside the program is wrong; its text goes to stderr as it is, without a traceback."""


class ConfigError(UserError):
    """The run file, an override or an argument cannot be used."""


class DataError(UserError):
    """A shard, an index or an image is missing, damaged or not what its index says."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A ready "; did you mean 'x'?" for `name`, or "" when nothing in `known` is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
