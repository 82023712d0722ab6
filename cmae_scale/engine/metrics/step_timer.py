"""Where the time of a step goes: a timer by the device's own clock, and torch's profiler."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cmae_scale.core.collectives import sum_of_ranks, world_size

# in the order of a step; "other" is what lies between them
SPANS = ("data", "augment", "forward", "target", "backward", "step", "ema", "log", "save", "other")

_NOTHING = nullcontext()


class StepTimer:
    """Splits time among names: each moment belongs to the innermost span that is open.

    On a GPU the marks are events in the stream, so that nothing waits until they are read; a name then has
    the time the GPU spent on it, and "data" that in which it stood idle for want of images. On the CPU they
    are readings of a clock. Switched off, a span is an empty context that is made once.
    """

    def __init__(self, device: torch.device, *, is_on: bool, names_operations: bool = False) -> None:
        self.is_on = is_on
        self.names_operations = names_operations  # also as labels in a profiler's trace
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._open = ["other"]
        self._marks: list[tuple[str, Any]] = []
        if is_on:
            self._mark()

    def span(self, name: str) -> AbstractContextManager[Any]:
        """Count the time inside as that of `name`, one of SPANS."""
        return self._record(name) if self.is_on or self.names_operations else _NOTHING

    def watch_(self, first: nn.Module, last: nn.Module, *, name: str) -> None:
        """Count as `name` what happens from the start of `first`'s forward pass to the end of `last`'s."""
        if self.is_on:
            first.register_forward_pre_hook(lambda module, inputs: self._enter(name))
            last.register_forward_hook(lambda module, inputs, output: self._leave())

    def read(self, steps: int) -> dict[str, float]:
        """Milliseconds per step by "ms_<name>", mean over ranks, since the last reading `steps` steps ago.

        Every rank must call it at the same step. Waits for the device.
        """
        if not self.is_on:
            return {}
        self._mark()
        total_ms = dict.fromkeys(SPANS, 0.0)
        if self._is_cuda:
            self._marks[-1][1].synchronize()
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total_ms[name] += begin.elapsed_time(end) if self._is_cuda else (end - begin) * 1e3
        del self._marks[:-1]
        means = sum_of_ranks(torch.tensor(list(total_ms.values()), device=self._device)) / world_size()
        per_step = (means / max(1, steps)).tolist()
        return {f"ms_{name}": round(value, 3) for name, value in zip(SPANS, per_step, strict=True)}

    @contextmanager
    def _record(self, name: str) -> Iterator[None]:
        label = torch.profiler.record_function(name) if self.names_operations else _NOTHING
        with label:
            self._enter(name)
            try:
                yield
            finally:
                self._leave()

    def _enter(self, name: str) -> None:
        assert name in SPANS, name
        self._open.append(name)
        self._mark()

    def _leave(self) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """From now on time belongs to the innermost open span."""
        if not self.is_on:
            return
        now: Any
        if self._is_cuda:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((self._open[-1], now))


_ROWS = 40  # of the table


class Profiler:
    """Records from before step `steps.start` to after the last of `steps`, then writes two files.

    They are `trace_A-B.json` for chrome://tracing or https://ui.perfetto.dev and `operations_A-B.txt`, with
    steps counted from 1 as in metrics.jsonl. A run that resumes in between records the rest.
    """

    def __init__(self, steps: range, *, folder: Path, device: torch.device, timer: StepTimer) -> None:
        self.steps = steps
        self.folder = folder
        self._device, self._timer = device, timer
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Begin to record if `step` is one of the chosen."""
        if self._profile is None and step in self.steps:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
            self._timer.names_operations = True

    def after(self, step: int) -> str | None:
        """End with the last of the chosen steps. Returns what to tell then."""
        return self.close() if step == self.steps[-1] else None

    def close(self) -> str | None:
        """Write what was recorded, if anything; returns what to tell. A full disk is told, never raised."""
        if self._profile is None:
            return None
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._timer.names_operations = False
        name = f"{self.steps[0] + 1}-{self.steps[-1] + 1}"
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            table = recorded.key_averages().table(sort_by=order, row_limit=_ROWS)
            (self.folder / f"operations_{name}.txt").write_text(table, encoding="utf-8")
            recorded.export_chrome_trace(str(self.folder / f"trace_{name}.json"))
        except (OSError, RuntimeError) as error:
            return f"warning: the trace of steps {name} cannot be written ({error})"
        return f"trace of steps {name}: {self.folder}"


def read_steps(text: str) -> range:
    """Steps counted from 0 of "10-12" or "10", which count from 1: 9, 10, 11."""
    first, _, last = text.partition("-")
    return range(int(first) - 1, int(last or first))
