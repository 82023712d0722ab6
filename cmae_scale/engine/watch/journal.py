"""What a run says while it goes on: metrics.jsonl, DeepSpeed's monitors and the progress line."""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.core.collectives import sum_of_ranks
from cmae_scale.core.durations import Timetable
from cmae_scale.core.files import LineFile, write_text
from cmae_scale.core.progress import Progress, format_seconds
from cmae_scale.data.bad_samples import BadSamples
from cmae_scale.engine.hardware import read_peak_flops
from cmae_scale.engine.optim import read_learning_rate
from cmae_scale.engine.session import Session
from cmae_scale.engine.watch.bad_list import BadList
from cmae_scale.engine.watch.meter import Meter

Metrics = dict[str, float | int | None]

# not for wandb, tensorboard and csv: what their axis says already, and what a run file can tell
_UNMONITORED = frozenset({"step", "samples", "epoch"})


class Journal:
    """Collects every step and writes a line when asked. All ranks call its methods; the first one writes."""

    def __init__(
        self, session: Session, *, times: Timetable, metric_names: Sequence[str], image_flops: int
    ) -> None:
        self.session = session
        self.times = times
        self.batch_samples: int = session.run.deepspeed["train_batch_size"]
        self.path = session.run.out / "metrics.jsonl"
        self._lines = LineFile(self.path)
        self.meter = Meter(metric_names)
        self.image_flops = image_flops
        peak = read_peak_flops(session.place.device)
        self.peak_flops = None if peak is None else peak * session.place.world.size
        self.last: Metrics = {}
        self.bad_list = BadList(session.run.out / "bad_samples.jsonl", is_first=session.place.world.is_first)
        self._listed = 0  # bad samples of all ranks at the last line
        self.progress: Progress | None = None
        if session.place.world.is_first:
            drop_later_lines(self.path, step=session.first_step)
            self.progress = Progress(times.total_steps, first_step=session.first_step)
        self._opened_s = time.monotonic()
        self._start_interval(session.first_step)

    def say(self, text: str) -> None:
        """Lines for people."""
        if self.progress is not None:
            self.progress.say(text)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as time the model waited for images."""
        started_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started_s

    def add(self, step: int, losses: Float[Tensor, " metrics"], *, keys: Sequence[str]) -> None:
        """Remember a step. Waits for nothing."""
        self.meter.add(step, losses, keys=keys)

    def write(self, done: int, *, scheduled: Mapping[str, float], bad: BadSamples) -> None:
        """The line of the steps since the last one; `done` optimizer steps are done.

        The only place of the loop where the host waits for the device. Raises, on all ranks, DivergedError
        when a loss was not finite and DataError when too many samples of all ranks are bad.
        """
        means = self.meter.read()
        elapsed_s = time.perf_counter() - self._started_s
        samples = (done - self._first) * self.batch_samples
        totals = sum_of_ranks(
            torch.tensor([float(bad.count), self._waited_s], device=self.session.place.device)
        )
        bad_samples, waited_s = int(totals[0]), float(totals[1])
        images_per_s = samples / elapsed_s
        metrics: Metrics = {
            "step": done,
            "samples": done * self.batch_samples,
            "epoch": round(done / self.times.steps_per_epoch, 4),
            **means,
            "lr": read_learning_rate(self.session.engine),
            **scheduled,
            "grad_norm": read_grad_norm(self.session.engine),
            "samples_per_s": round(images_per_s, 2),
            "mfu": self.peak_flops and round(images_per_s * self.image_flops / self.peak_flops, 4),
            "data_wait_s": round(waited_s / self.session.place.world.size, 4),
            "peak_gib": round(read_peak_gib(self.session.place.device), 3),
            "bad_samples": bad_samples,
        }
        self.last = metrics
        if self.progress is not None:
            if failed := self._lines.add(json.dumps(metrics) + "\n"):
                self.say(f"warning: {self.path} cannot be written ({failed}); its lines wait in memory")
            write_monitors(self.session.engine, metrics)
            self.progress.report(done, self._figures(metrics))
        self._start_interval(done)
        if bad_samples > self._listed:
            self.bad_list.add(bad.take_new())
            self._listed = bad_samples
        bad.check(bad_samples, seen=(done - self.session.first_step) * self.batch_samples)

    def note(self, done: int, found: Mapping[str, Any]) -> None:
        """A line of its own for what an evaluation found after `done` steps; training's clock starts anew."""
        if self.progress is not None:
            metrics = {
                "step": done,
                "samples": done * self.batch_samples,
                "epoch": round(done / self.times.steps_per_epoch, 4),
                **found,
            }
            if failed := self._lines.add(json.dumps(metrics) + "\n"):
                self.say(f"warning: {self.path} cannot be written ({failed}); its lines wait in memory")
            write_monitors(self.session.engine, flatten_metrics(metrics))
            shown = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
            self.say(f"step {done}: {', '.join(shown)}")
        self._start_interval(done)

    def summarise(self) -> str:
        """The closing line."""
        seconds = format_seconds(time.monotonic() - self._opened_s)
        steps = f"{self.times.total_steps} steps"
        if not self.last:
            return f"{steps} were done already"
        figures = ", ".join(f"{name} {self.last[name]:.4f}" for name in self.meter.names)
        return f"done: {steps}, {self.last['samples']:,} images, {seconds}; at the end {figures}"

    def close(self) -> None:
        """End the progress line."""
        if self.progress is not None:
            self.progress.close()

    def _figures(self, metrics: Metrics) -> dict[str, str]:
        return {
            **{name: f"{metrics[name]:.4f}" for name in self.meter.names},
            "lr": f"{metrics['lr']:.2e}",
            "images/s": f"{metrics['samples_per_s']:.1f}",
        }

    def _start_interval(self, done: int) -> None:
        self._first = done
        self._started_s = time.perf_counter()
        self._waited_s = 0.0


def drop_later_lines(path: Path, *, step: int) -> None:
    """Cut metrics.jsonl back to what was known at `step`, so that a resumed run writes no line twice."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be torn
    write_text(path, "".join(kept))


def flatten_metrics(metrics: Mapping[str, Any]) -> Metrics:
    """Numbers by class as metrics of their own ("knn_per_class/dog"), as monitors want them."""
    flat: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in value.items()})
        else:
            flat[name] = value
    return flat


def read_grad_norm(engine: Any) -> float | None:
    """Norm of the last step's whole gradient before clipping; None where DeepSpeed does not compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def read_peak_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def write_monitors(engine: Any, metrics: Metrics) -> None:
    """Hand the metrics to whatever monitors the run file's DeepSpeed sections turned on."""
    if engine.monitor.enabled:
        samples = metrics["samples"]
        engine.monitor.write_events(
            [
                (f"Train/Samples/{name}", metrics[name], samples)
                for name in metrics
                if name not in _UNMONITORED and metrics[name] is not None
            ]
        )
