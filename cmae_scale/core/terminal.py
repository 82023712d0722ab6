"""The one way to people's terminals: safe text (no control character, no secret) and the progress line."""

import os
import re
import sys
import time
from collections.abc import Mapping
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


class Progress:
    """Writes a line per report with step, given figures, and the time left at the present speed.

    Only one process should hold an enabled one. `clock` returns seconds.
    """

    def __init__(self, total_steps: int, *, first_step: int = 0, stream: TextIO | None = None) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.stream = sys.stdout if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.started_s = time.monotonic()
        self._open_line = False

    def report(self, step: int, figures: Mapping[str, str]) -> None:
        """Say that `step` optimizer steps are done. On a terminal the line replaces the one before."""
        width = len(str(self.total_steps))
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        line = make_safe(f"step {step:>{width}}/{self.total_steps}  {text}  left {self._left(step)}")
        if self.is_terminal:
            self.stream.write(f"\r\x1b[2K{line}")
            self._open_line = True
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def say(self, text: str) -> None:
        """A line of its own that stays."""
        self.close()
        tell(text, to=self.stream)

    def close(self) -> None:
        """End the live line."""
        if self._open_line:
            self.stream.write("\n")
            self._open_line = False

    def _left(self, step: int) -> str:
        done = step - self.first_step
        if done <= 0:
            return "?"
        return format_seconds((time.monotonic() - self.started_s) / done * (self.total_steps - step))


def format_seconds(seconds: float) -> str:
    """ "1d 02h", "3h 05m", "4m 10s" or "12s"."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_m = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days}d {rest_h:02d}h"
    if hours:
        return f"{hours}h {rest_m:02d}m"
    return f"{minutes}m {rest_s:02d}s" if minutes else f"{rest_s}s"
