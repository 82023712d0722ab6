"""The one way to people's terminals, past which no file's control character and no secret comes."""

import os
import re
import sys
from typing import TextIO

from cmae_scale.core.credentials import mask

# C0 and C1 but for line ends and tabs; what turns the direction of writing; halves of characters
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def make_safe(text: str) -> str:
    r"""The text with secrets masked and every control character spelt out, as "\x1b"."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), mask(text))


def make_safe_name(text: str, *, longest: int = 1000) -> str:
    """The same on one line, cut where it is longer: for the names of others inside of tables and pictures."""
    line = make_safe(text).replace("\n", "\\n").replace("\t", "\\t")
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def tell(text: object, *, to: TextIO | None = None) -> None:
    """A line, or lines, on stdout or `to`, at once. What its encoding lacks is spelt out.

    Where its reader has left (`| head`, a closed `tee`), nobody is told any more, and the work goes on.
    """
    stream = sys.stdout if to is None else to
    safe = make_safe(str(text))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(safe.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
