"""RUN/skipped_steps.jsonl: the steps that were left out, and why; a resumed run leaves out the same ones."""

import json
from pathlib import Path
from typing import Any, Literal

from cmae_scale.config.cmae import FaultsConfig
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import DivergedError
from cmae_scale.core.files import LineFile
from cmae_scale.core.strict_json import parse_line
from cmae_scale.engine.step_guard import BadStep

Decision = Literal["skip", "rewind"]


class SkippedSteps:
    """The steps of a run that are left out. All ranks know them; the first one writes.

    A step is listed once and for all: also where a run goes back to a checkpoint before it.
    """

    def __init__(self, path: Path, *, faults: FaultsConfig, is_first: bool) -> None:
        self._file = LineFile(path)
        self._faults = faults
        self._is_first = is_first
        # rank 0's reading: others may see a shared folder later
        self.steps: dict[int, dict[str, Any]] = gather_objects(_read(path) if is_first else {})[0]

    def before(self, step: int) -> list[int]:
        """Those before `step`, in order."""
        return sorted(listed for listed in self.steps if listed < step)

    def in_a_row(self, step: int) -> int:
        """How many steps directly before `step` were left out."""
        count = 0
        while step - 1 - count in self.steps:
            count += 1
        return count

    def decide(self, bad: BadStep, *, newest_state: int | None) -> Decision:
        """What to do about a bad step, which is listed then. Raises DivergedError where the run must stop.

        Every rank gets the same answer, for all know the same. A rewind comes once per state: if the steps
        after it go wrong again, the state itself is at fault. Without a state the step is left out.
        """
        faults = self._faults
        if faults.bad_step == "stop":
            raise DivergedError(
                f"{bad}; nothing of it reached the weights: cmae.faults.bad_step=skip would leave the step "
                "out, else look at these images, lower cmae.schedule.base_lr or set gradient_clipping"
            )
        if self.in_a_row(bad.step) >= faults.max_bad_steps:
            raise DivergedError(
                f"{bad}, after {self.in_a_row(bad.step)} steps in a row were left out, as many as "
                "cmae.faults.max_bad_steps allows; nothing of them reached the weights: lower "
                "cmae.schedule.base_lr, set gradient_clipping, or go back to an older checkpoint"
            )
        decision: Decision = "skip"
        if faults.bad_step == "rewind" and newest_state is not None:
            if any(line["rewound_to"] == newest_state for line in self.steps.values()):
                raise DivergedError(
                    f"{bad}, again after going back to the checkpoint of step {newest_state}: it or the "
                    "settings are at fault, go back to an older one or lower cmae.schedule.base_lr"
                )
            decision = "rewind"
        self._list(bad, rewound_to=newest_state if decision == "rewind" else None)
        return decision

    def _list(self, bad: BadStep, *, rewound_to: int | None) -> None:
        line = {
            "step": bad.step,
            "cause": bad.cause,
            "ranks": list(bad.ranks),
            "losses": {
                rank: {name: str(value) for name, value in losses.items()}  # JSON knows no NaN
                for rank, losses in bad.losses.items()
            },
            "samples": list(bad.samples),
            "rewound_to": rewound_to,
        }
        self.steps[bad.step] = line
        if self._is_first:
            self._file.add(json.dumps(line) + "\n")  # on a full disk it waits for the next one


def _read(path: Path) -> dict[int, dict[str, Any]]:
    if not path.is_file():
        return {}
    lines = {}
    for line in map(parse_line, path.read_bytes().splitlines()):
        if line and type(step := line.get("step")) is int:  # else its step is checked again
            lines[step] = {"rewound_to": None, **line}
    return lines
