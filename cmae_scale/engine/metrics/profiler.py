"""A torch profiler trace of chosen steps, for a viewer and as a table of what took longest."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from cmae_scale.engine.metrics.step_timer import StepTimer

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
