"""DeepSpeed's monitors (wandb, tensorboard, csv) in threads: they may fail or stall, training does not.

DeepSpeed would open them inside of the engine, where a network that is down holds up the start for 90 s and
then ends the run, and would write to them from the training thread, reading the loss from the device at every
step. Here they are opened and written to by a thread; what they do not take in time is dropped, for
metrics.jsonl has it all.
"""

import os
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from cmae_scale.engine.zero.patches import SECTIONS, open_monitor

Event = tuple[str, float | int, int]  # name, value, samples

WANDB_TIMEOUT_S = "10"  # to reach the server; then the run is logged offline. wandb's own is 90
WAITING_LINES = 1000  # of metrics, for a monitor that does not keep up; newer ones are dropped
CLOSE_S = 10.0  # for what still waits when the run ends


class MetricsWriters:
    """What the run file's DeepSpeed sections turn on. `say` tells people of trouble, once per kind.

    `kept` goes into the run's states and comes back from them: wandb's name of the run, so that a run that
    goes on is the same one there, and one that starts anew is another.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        is_first: bool,
        say: Callable[[str], None],
        kept: dict[str, Any] | None = None,
        build: Callable[[str, dict[str, Any]], Any] = open_monitor,
    ) -> None:
        on = [name for name in SECTIONS if settings.get(name, {}).get("enabled", False)] if is_first else []
        if "wandb" in on and kept is not None:
            os.environ.setdefault("WANDB_RUN_ID", kept.setdefault("wandb_id", secrets.token_hex(4)))
            os.environ.setdefault("WANDB_RESUME", "allow")
        self._outlets = [_Outlet(name, settings[name], say=say, build=build) for name in on]

    def write(self, events: Sequence[Event]) -> None:
        """Hand them over. Never waits."""
        for outlet in self._outlets:
            outlet.write(events)

    def close(self) -> None:
        """Give what still waits some time."""
        for outlet in self._outlets:
            outlet.close()
        self._outlets = []


class _Outlet:
    """One monitor and its thread: a stalled one keeps no other from writing."""

    def __init__(
        self,
        name: str,
        section: dict[str, Any],
        *,
        say: Callable[[str], None],
        build: Callable[[str, dict[str, Any]], Any],
    ) -> None:
        self._name, self._section, self._say, self._build = name, section, say, build
        self._told: set[str] = set()
        self._events: queue.Queue[Sequence[Event] | None] = queue.Queue(WAITING_LINES)
        self._thread = threading.Thread(target=self._run, name=f"monitor {name}", daemon=True)
        self._thread.start()

    def write(self, events: Sequence[Event]) -> None:
        try:
            self._events.put_nowait(events)
        except queue.Full:
            self._tell_once(f"warning: {self._name} does not keep up (metrics.jsonl has every line)")

    def close(self) -> None:
        with suppress(queue.Full):
            self._events.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        monitor = self._open()
        while (events := self._events.get()) is not None:
            if monitor is None:
                continue
            try:
                monitor.write_events(events)
            except Exception as error:  # whatever the client of a far server may raise
                self._tell_once(f"warning: {self._name} does not take metrics ({_first_line(error)})")

    def _open(self) -> Any:
        if self._name == "wandb":
            self._settle_wandb()
        try:
            return self._build(self._name, self._section)
        except Exception as error:
            if self._name == "wandb" and os.environ.get("WANDB_MODE") != "offline":
                self._tell_once(
                    f"warning: wandb cannot be reached ({_first_line(error)}): this run is logged offline, "
                    "wandb sync wandb/*"
                )
                _go_offline()
                return self._open()
            self._tell_once(f"warning: {self._name} cannot be opened ({_first_line(error)})")
            return None

    def _settle_wandb(self) -> None:
        """Offline when nobody is logged in, and soon when nobody answers."""
        with suppress(ImportError):
            import wandb

            os.environ.setdefault("WANDB_INIT_TIMEOUT", WANDB_TIMEOUT_S)
            if "WANDB_MODE" not in os.environ and wandb.api.api_key is None:
                self._tell_once(
                    "wandb: nobody is logged in: this run is logged offline (wandb login, wandb sync wandb/*)"
                )
                _go_offline()

    def _tell_once(self, text: str) -> None:
        kind = text.split("(")[0]
        if kind not in self._told:
            self._told.add(kind)
            self._say(text)


def _go_offline() -> None:
    import wandb

    os.environ["WANDB_MODE"] = "offline"
    with suppress(Exception):  # half-open connections of the failed attempt
        wandb.teardown()  # it has read the environment already: let it do so again


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
