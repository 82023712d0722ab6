"""Credentials in settings stay in memory: whatever is written or said holds a mask in their place.

Nobody can list every name that a secret goes by, so all of a place that may hold one counts as secret: the
user and password of an address, the values of its query, the words of a command. What is read from the
environment (`${NAME}` in the place of a value) is no secret until then, and stays as it is.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_text

MASK = "*****"

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_COMMAND = re.compile(r"pipe:(\S*)[ \t]+(?!\*)[^\n]*")  # a mask or more is how places.show_location ends one
_ADDRESS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)([^\s\"'<>]*)")
# "user:password@", "token@"; a password may hold a slash, but "host:8080/" is none
_USER = re.compile(r"(?!\[)[^/?#@]*:(?!\d*(?:[/?#]|$)).*@|[^/?#]*@")
_WEB = ("http://", "https://")
_QUERY = re.compile(r"[?#].*")
_PARAMETER = re.compile(r"([?&;#])(?:([^=&;#/]*=)|)([^&;#]*)")
_NAMES = r"api_?key|access_?key|private_?key|token|secret|password|passwd|credentials?"
_NAMED = re.compile(rf"((?:{_NAMES})\s*=\s*[\"']?)([^\s\"'&,;]+)", re.IGNORECASE)
_HEADER = re.compile(r"\b(authorization:\s*(?:\w+\s+)?|bearer\s+(?=\S{8}))[^\s\"']+", re.IGNORECASE)
_SECRET_NAME = re.compile(rf"(?:^|_)(?:{_NAMES})$", re.IGNORECASE)
_HARMLESS = re.compile(r"|true|false|[01]|\*+")  # ?download=true


def mask(text: str) -> str:
    """The text without the credentials of addresses and commands in it. Masking twice changes nothing."""
    text = _COMMAND.sub(rf"pipe:\1 {MASK}", text)
    text = _ADDRESS.sub(_mask_address, text)
    text = _NAMED.sub(lambda match: match[1] + _mask_value(match[2]), text)
    return _HEADER.sub(rf"\1{MASK}", text)


def mask_tree(value: Any) -> Any:
    """The same for JSON values, in which also names tell that a value is secret."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, Mapping):
        return {
            name: _mask_value(inner)
            if isinstance(inner, str) and _SECRET_NAME.search(name)
            else mask_tree(inner)
            for name, inner in value.items()
        }
    return [mask_tree(inner) for inner in value] if isinstance(value, list | tuple) else value


def list_masked(tree: Any, place: str = "") -> Iterator[str]:
    """Places of settings that hold a mask instead of a value: they were written by a run, not by a user."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from list_masked(value, f"{place}.{name}" if place else name)
    elif MASK in (tree if isinstance(tree, str) else str(tree)):
        yield place


def fill_in(text: str, *, environ: Mapping[str, str] = os.environ) -> str:  # noqa: TID251
    """The text with the environment's value for each `${NAME}`. ConfigError for a name that is not set."""

    def read(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise ConfigError(f"{mask(text)} asks for a variable that is not set: export {match[1]}=...")
        return environ[match[1]]

    return _VARIABLE.sub(read, text)


def write_settings(path: Path, text: str) -> None:
    """A file of settings, already masked. Where there was a secret, only its owner may read it."""
    write_text(path, text, is_private=MASK in text)


def _mask_address(address: re.Match[str]) -> str:
    """Beyond the web a question mark may be a pattern's."""
    rest, is_web = address[2], address[1].lower() in _WEB
    if (user := _USER.match(rest)) and _VARIABLE.sub("", user[0]).strip(":@"):
        rest = f"{MASK}@{rest[user.end() :]}"

    def mask_parameter(match: re.Match[str]) -> str:
        separator, name, value = match[1], match[2] or "", match[3]
        return separator + name + (_mask_value(value) if name or is_web else value)

    return address[1] + _QUERY.sub(lambda query: _PARAMETER.sub(mask_parameter, query[0]), rest)


def _mask_value(value: str) -> str:
    return value if _HARMLESS.fullmatch(value) or _VARIABLE.fullmatch(value) else MASK
