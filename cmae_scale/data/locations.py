"""Where shards are, as text: paths, addresses and commands; ranges in braces; what of it may be shown."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from cmae_scale.core.credentials import MASK, mask
from cmae_scale.core.errors import ConfigError

COMMAND = "pipe"
REMOTE = ("http", "https", "s3", "gs", "hf")
NAME_FIELD = "{name}"  # in a command: the file of the folder that it is asked for
MAX_EXPANSION = 1_000_000  # a mistyped range must not fill the memory

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):")  # two letters at least: C: is a drive
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_GLOB = re.compile(r"[*?\[]")


def read_scheme(location: str) -> str:
    """`s3` of "s3://bucket/train", "" for a path. ConfigError for a scheme that is not read."""
    match = _SCHEME.match(location)
    if match is None:
        return ""
    scheme = match[1].lower()
    if scheme == COMMAND:
        return scheme
    if scheme not in REMOTE or not location[match.end() :].startswith("//"):
        known = ", ".join(f"{known}://" for known in REMOTE)
        raise ConfigError(f"shards are not read from {scheme}: give a path or one of {known}")
    return scheme


def expand_braces(location: str) -> Iterator[str]:
    """All that "train-{00..03}" or "{train,extra}" stands for, in order. Commands stay as they are.

    A range counts with as many digits as its first number has.
    """
    match = None if read_scheme(location) == COMMAND else _RANGE.search(location) or _LIST.search(location)
    if match is None:
        yield location
        return
    head, tail = location[: match.start()], location[match.end() :]
    if match.re is _RANGE:
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + MAX_EXPANSION:
            shown = show_location(location)
            raise ConfigError(f"{match[0]} in {shown} must count upwards, by less than a million")
        parts: Iterator[str] = (str(number).zfill(len(match[1])) for number in range(first, last + 1))
    else:
        parts = iter(match[1].split(","))
    for part in parts:
        yield from expand_braces(head + part + tail)


def is_pattern(location: str) -> bool:
    """Whether it holds *, ? or [: the question mark of an address begins its query instead."""
    if read_scheme(location) in ("http", "https"):
        location = urlsplit(location).path
    return _GLOB.search(location) is not None


def join_location(folder: str, name: str) -> str:
    """The file `name` of a folder: a path, an address (its query stays at the end) or a command."""
    match read_scheme(folder):
        case "http" | "https":
            parts = urlsplit(folder)
            return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        case "pipe":
            return f"{folder}\0{name}"  # never put together as text: a name must not become a word of it
        case "":
            return str(PurePosixPath(folder) / name)
    return f"{folder.rstrip('/')}/{name}"


def split_location(location: str) -> tuple[str, str]:
    """Folder and last name of a path or an address, so that join_location gives it back."""
    if read_scheme(location) in ("http", "https"):
        parts = urlsplit(location)
        head, _, name = parts.path.rpartition("/")
        return urlunsplit(parts._replace(path=head)), name
    head, slash, name = location.rpartition("/")
    return head or slash or ".", name


def show_location(location: str) -> str:
    """The location as messages may hold it: without user, password, query and the words of a command."""
    if location.startswith(f"{COMMAND}:"):
        command, _, name = location.partition("\0")
        program = command.removeprefix(f"{COMMAND}:").split(maxsplit=1)
        return f"{COMMAND}:{program[0] if program else ''} {MASK} {name}".rstrip()
    if "://" not in location:
        return location
    parts = urlsplit(mask(location))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
