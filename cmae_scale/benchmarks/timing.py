"""Several ways to do the same work, timed in turns on one thread, and told beside each other."""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple

from cmae_scale.report.records import Timing

Way = Callable[[], object]


class Part(NamedTuple):
    """`units` of work are done by each call of each of the `ways`, our own first."""

    ways: dict[str, Way]
    units: int
    unit: str


class Scale(NamedTuple):
    """How large the work is: of ViT-B or S at 224 px, or of a rehearsal."""

    embed_dim: int = 768
    depth: int = 12
    images: int = 32
    img_px: int = 224
    samples: int = 400
    sample_bytes: int = 110_000
    step_images: int = 8
    is_tiny: bool = False  # a rehearsal, whose figures mean nothing


def time_part(part: Part, *, rounds: int) -> dict[str, list[Timing]]:
    """Seconds of a unit by each way, after a round that warms up."""
    timings: dict[str, list[Timing]] = {name: [] for name in part.ways}
    for number in range(rounds + 1):
        for name, way in part.ways.items():
            cpu_s, wall_s = _read_cpu_s(), time.perf_counter()
            way()
            cpu_s, wall_s = _read_cpu_s() - cpu_s, time.perf_counter() - wall_s
            if number:
                timings[name].append(Timing(cpu_s / part.units, wall_s / part.units))
    return timings


def _read_cpu_s() -> float:
    """Of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def describe_part(name: str, part: Part, timings: dict[str, list[Timing]]) -> str:
    """The least CPU time of each way, in lines for people."""
    least = {way: min(timing.cpu_s for timing in runs) for way, runs in timings.items()}
    ours = next(iter(least.values()))
    title = f"{name}, CPU time of {'an' if part.unit[0] in 'aeiou' else 'a'} {part.unit}"
    lines = [f"{title:48} {'us':>10} {'/ ours':>7}"]
    return "\n".join(
        [*lines, *(f"  {way:46} {1e6 * cpu_s:10.1f} {cpu_s / ours:6.2f}x" for way, cpu_s in least.items())]
    )
