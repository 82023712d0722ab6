"""Making shards beside decoding the same images and beside merely copying and hashing them."""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cmae_scale.data.decode import decode_pixels
from cmae_scale.report.records import Timing

COPY = "copy and hash"
MAKE = "make_shards"
DECODE = "decode"


def benchmark_shards(
    files: Sequence[Path], *, make: Callable[[Path], None], scratch: Path, rounds: int
) -> dict[str, list[Timing]]:
    """Seconds per image of each, interleaved, after a round that warms up and does not count.

    `make` writes shards of the files into the folder that it is given, in this process.
    """

    def copy(folder: Path) -> None:
        digest = hashlib.sha256()
        with (folder / "copy").open("wb") as out:
            for path in files:
                data = path.read_bytes()
                out.write(data)
                digest.update(data)
            out.flush()
            os.fsync(out.fileno())

    def decode(_: Path) -> None:
        for path in files:
            decode_pixels(path.read_bytes(), max_mpx=50.0)

    timings: dict[str, list[Timing]] = {COPY: [], MAKE: [], DECODE: []}
    for number in range(rounds + 1):
        for name, work in {COPY: copy, MAKE: make, DECODE: decode}.items():
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                cpu_s, wall_s = time.process_time(), time.perf_counter()
                work(Path(folder))
                cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            if number > 0:
                timings[name].append(Timing(cpu_s / len(files), wall_s / len(files)))
    return timings


def describe_shard_benchmark(timings: dict[str, list[Timing]], *, images: int, mb_per_image: float) -> str:
    """The lowest times and rates, in lines for people."""
    title = f"lowest of {len(timings[MAKE])}"
    lines = [f"{title:14} {'CPU ms':>8} {'ms':>8} {'MB/s':>8}   for each of {images:,} images"]
    lowest = {name: Timing(*map(min, zip(*runs, strict=True))) for name, runs in timings.items()}
    for name, (cpu_s, wall_s) in lowest.items():
        lines.append(f"{name:14} {1e3 * cpu_s:8.3f} {1e3 * wall_s:8.3f} {mb_per_image / wall_s:8.1f}")
    gain = lowest[DECODE].wall_s / lowest[MAKE].wall_s
    return "\n".join([*lines, f"make_shards is {gain:.1f} times as fast as decoding"])
