"""What a run says while it goes on: metrics.jsonl, DeepSpeed's monitors and the progress line."""

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cmae_scale.config.run_file import Run, name_settings
from cmae_scale.config.schedules import Timetable
from cmae_scale.core.collectives import gather_rows, sum_of_ranks, world_size
from cmae_scale.core.files import LineFile
from cmae_scale.core.terminal import Progress, format_seconds
from cmae_scale.core.world import World
from cmae_scale.data.decoding import BadSamples
from cmae_scale.engine.metrics.files import BadList, drop_later_lines, set_aside
from cmae_scale.engine.metrics.health import CollapseWarnings, Health
from cmae_scale.engine.metrics.step_timer import Profiler, StepTimer, read_steps
from cmae_scale.engine.metrics.writers import Event, MetricsWriters
from cmae_scale.engine.process.devices import read_peak_flops

Metrics = dict[str, float | int | None]

# not for wandb, tensorboard and csv: what their axis says already, and what a run file can tell
_UNMONITORED = frozenset({"step", "samples", "epoch"})


class MetricsLogger:
    """Collects every step and writes a line when asked. All ranks call its methods; the first one writes."""

    def __init__(
        self,
        run: Run,
        *,
        world: World,
        device: torch.device,
        times: Timetable,
        metric_names: Sequence[str],
        image_flops: int,
        timer: StepTimer,
        health: Health | None,
        extra: dict[str, Any],
        first_step: int,
    ) -> None:
        self.run, self.world, self.device, self.times = run, world, device, times
        self.timer, self.health, self.image_flops = timer, health, image_flops
        self.batch_samples: int = run.deepspeed["train_batch_size"]
        self.path = run.out / "metrics.jsonl"
        self.last: Metrics = {}
        self.progress = Progress(times.total_steps, first_step=first_step) if world.is_first else None
        self.writers = MetricsWriters(run.deepspeed, is_first=world.is_first, say=self.say, kept=extra)
        self.bad_list = BadList(run.out / "bad_samples.jsonl", is_first=world.is_first)
        self._lines = LineFile(self.path)
        self._average = MetricAverage(metric_names)
        self._warnings = CollapseWarnings(warmup_steps=times.warmup_steps)
        peak = read_peak_flops(device)
        self._peak_flops = None if peak is None else peak * world.size
        self._first_step = first_step
        self._listed = 0  # bad samples of all ranks at the last line
        self._opened_s = time.monotonic()
        self.go_to(first_step)

    def say(self, text: str) -> None:
        """Lines for people."""
        if self.progress is not None:
            self.progress.say(name_settings(text, self.run.kind))

    def watch(self, steps: range) -> Iterator[int]:
        """The same steps, looked at closely where the run file asks: for a log line, for a profiler."""
        trace = self._open_trace()
        log_every = self.run.settings.monitor.log_every
        try:
            for step in steps:
                if self.health is not None:
                    self.health.is_due = (step + 1) % log_every == 0 or step + 1 == steps.stop
                if trace is not None:
                    trace.before(step)
                yield step
                if trace is not None and (told := trace.after(step)):
                    self.say(told)
        finally:
            if trace is not None and (told := trace.close()):
                self.say(told)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as time the model waited for images."""
        started_s = time.perf_counter()
        with self.timer.span("data"):
            yield
        self._waited_s += time.perf_counter() - started_s

    def go_to(self, step: int) -> None:
        """Begin, or begin again, after `step` steps: what was told of later ones is taken back."""
        if self.world.is_first:
            if step == 0 and (kept := set_aside(self.path)):
                self.say(f"no checkpoint to go on from: the metrics of an earlier start are kept in {kept}")
            if damaged := drop_later_lines(self.path, step=step):
                self.say(f"warning: {damaged} lines of {self.path} were no lines of metrics and are left out")
        self._average = MetricAverage(self._average.names)
        self._start_interval(step)

    def add(self, losses: Float[Tensor, " metrics"]) -> None:
        """Remember a step. Waits for nothing."""
        self._average.add(losses)

    def write(
        self,
        done: int,
        *,
        lr: float,
        grad_norm: float | None,
        scheduled: Mapping[str, float],
        bad: BadSamples,
    ) -> None:
        """The line of the steps since the last one; `done` optimizer steps are done.

        The host waits for the device here, else only where an update needs its norm. Raises DataError on all
        ranks when too many samples of all of them are bad.
        """
        with self.timer.span("log"):
            self._write(done, {"lr": lr, **scheduled, "grad_norm": grad_norm}, bad)

    def _write(self, done: int, told: Metrics, bad: BadSamples) -> None:
        means = self._average.read()
        elapsed_s = time.perf_counter() - self._started_s
        samples = (done - self.written) * self.batch_samples
        totals = sum_of_ranks(torch.tensor([float(bad.count), self._waited_s], device=self.device))
        bad_samples, waited_s = int(totals[0]), float(totals[1])
        images_per_s = samples / elapsed_s
        health = {} if self.health is None else self.health.read(contrast=means.get("contrast"))
        metrics: Metrics = {
            "step": done,
            "samples": done * self.batch_samples,
            "epoch": round(done / self.times.steps_per_epoch, 4),
            **means,
            **told,
            **health,
            "samples_per_s": round(images_per_s, 2),
            "mfu": self._peak_flops and round(images_per_s * self.image_flops / self._peak_flops, 4),
            "data_wait_s": round(waited_s / self.world.size, 4),
            "peak_gib": round(read_peak_gib(self.device), 3),
            "bad_samples": bad_samples,
            **self.timer.read(done - self.written),
        }
        self.last = metrics
        if self.progress is not None:
            if failed := self._lines.add(json.dumps(metrics) + "\n"):
                self.say(f"warning: {self.path} cannot be written ({failed}); its lines wait in memory")
            self.writers.write(list_events(metrics))
            self.progress.report(done, self._figures(metrics))
            for advice in self._warnings.check(metrics):
                self.say(advice)
        self._start_interval(done)
        if bad_samples > self._listed:
            self.bad_list.add(bad.take_new())
            self._listed = bad_samples
        bad.check(bad_samples, seen=(done - self._first_step) * self.batch_samples)

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
            self.writers.write(list_events(flatten_metrics(metrics)))
            shown = [f"{name} {value:.4f}" for name, value in found.items() if isinstance(value, float)]
            self.say(f"step {done}: {', '.join(shown)}")
        self._start_interval(done)

    def summarise(self) -> str:
        """The closing line."""
        seconds = format_seconds(time.monotonic() - self._opened_s)
        steps = f"{self.times.total_steps} steps"
        if not self.last:
            return f"{steps} were done already"
        figures = ", ".join(f"{name} {_show(self.last[name])}" for name in self._average.names)
        return f"done: {steps}, {self.last['samples']:,} images, {seconds}; at the end {figures}"

    def close(self) -> None:
        """End the progress line, and what the monitors still have to write."""
        self.writers.close()
        if self.progress is not None:
            self.progress.close()

    def _open_trace(self) -> Profiler | None:
        profile = self.run.settings.monitor.profile
        if profile is None or not self.world.is_first:
            return None
        return Profiler(
            read_steps(profile),
            folder=self.run.out / "profile",
            device=self.device,
            timer=self.timer,
        )

    def _figures(self, metrics: Metrics) -> dict[str, str]:
        return {
            **{name: _show(metrics[name]) for name in self._average.names},
            "lr": f"{metrics['lr']:.2e}",
            "images/s": f"{metrics['samples_per_s']:.1f}",
        }

    def _start_interval(self, done: int) -> None:
        self.written = done  # steps that lines have told of
        self._started_s = time.perf_counter()
        self._waited_s = 0.0


def flatten_metrics(metrics: Mapping[str, Any]) -> Metrics:
    """Numbers by class as metrics of their own ("knn_per_class/dog"), as monitors want them."""
    flat: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{inner}": number for inner, number in value.items()})
        else:
            flat[name] = value
    return flat


def read_peak_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def list_events(metrics: Metrics) -> list[Event]:
    """The metrics as DeepSpeed's monitors take them."""
    samples = int(metrics["samples"] or 0)
    return [
        (f"Train/Samples/{name}", value, samples)
        for name, value in metrics.items()
        if name not in _UNMONITORED and value is not None
    ]


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class MetricAverage:
    """Collects the losses of steps, which have `names`, until they are read."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._losses: list[Tensor] = []

    def add(self, losses: Float[Tensor, " metrics"]) -> None:
        """Remember one step of this rank. Waits for nothing."""
        self._losses.append(losses)

    def read(self) -> dict[str, float | None]:
        """Means by name, over the steps since the last reading and over all ranks; None without any step.

        Every rank must call it at the same step, and have added the same ones.
        """
        if not self._losses:
            return dict.fromkeys(self.names)
        table = gather_rows(torch.stack(self._losses)).view(world_size(), len(self._losses), len(self.names))
        means = table.cpu().double().mean(dim=(0, 1)).tolist()
        self._losses = []
        return dict(zip(self.names, means, strict=True))
