"""Asked to leave: a signal to any rank becomes one decision of all ranks at the next step."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cmae_scale.core.collectives import world_size
from cmae_scale.core.errors import UserError

# Slurm warns with SIGUSR1 (--signal) or SIGTERM; the deepspeed launcher passes on SIGTERM, to one rank after
# the other with 30 s for each, so that a rank must not wait for its own signal.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class InterruptedRunError(UserError):
    """The run was asked to leave and has saved its state after `step` steps."""

    exit_status = 75  # sysexits' EX_TEMPFAIL: start the same command again
    is_everywhere = True

    def __init__(self, step: int) -> None:
        super().__init__(f"asked to leave after step {step}: the same command goes on from there")


class StopRequest:
    """Whether some rank was asked to leave. A second signal to the same rank ends it at once."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._before: dict[int, Any] = {}
        # on the CPU, so that asking costs no wait for the GPU
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """True on all ranks once any of them has been asked; every rank must ask at the same step."""
        flag = torch.tensor([int(self._name is not None)])
        if self._group is not None:
            dist.all_reduce(flag, group=self._group)
        return bool(flag)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._name is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._name = signal.Signals(number).name
