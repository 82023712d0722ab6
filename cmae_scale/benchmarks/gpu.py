"""What the first minutes on a GPU should find out, part by part, the most valuable first.

Each part runs in a process of its own under a time limit, and each of its figures is kept as soon as it is
known: a part that hangs, fails or is killed costs no other figure. Run again on the same code and hardware,
only what is missing is measured.
"""

import hashlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch

from cmae_scale.benchmarks.gpu_checks import (
    benchmark_kernels,
    check_agreement,
    check_repetition,
    check_trace,
    check_waits,
    describe_device,
)
from cmae_scale.benchmarks.gpu_speed import benchmark_loader, benchmark_steps
from cmae_scale.benchmarks.noise import Stage
from cmae_scale.core.errors import ConfigError
from cmae_scale.report.records import describe_hardware, write_record

Figures = dict[str, Any]
Results = dict[str, dict[str, Figures]]  # by part and name


class Part(NamedTuple):
    """Yields names and their figures; `limit_s` is halved by --quick, and patient in a rehearsal."""

    measure: Callable[[Stage], Iterator[tuple[str, Figures]]]
    limit_s: float


PARTS = {
    "device": Part(describe_device, 60),
    "agreement": Part(check_agreement, 90),
    "trace": Part(check_trace, 90),
    "repetition": Part(check_repetition, 240),
    "waits": Part(check_waits, 60),
    "kernels": Part(benchmark_kernels, 60),
    "loader": Part(benchmark_loader, 120),
    "steps": Part(benchmark_steps, 900),
}
END = "end"  # of a part: whether it was quick, or why it failed


def measure_parts(stage: Stage, *, record: Path, tell: Callable[[str], None]) -> Results:
    """All figures of all parts; those that `record` holds already for this code and hardware stay.

    Raises ConfigError where there is no GPU to measure and no other device was asked for.
    """
    if stage.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("bench gpu: torch sees no GPU here: --device cpu rehearses it in small on the CPU")
    device = torch.cuda.get_device_name() if stage.device == "cuda" else "cpu, tiny models"
    config = {"device": device, "code": _digest_code()}
    results = _read_results(record, config)
    for name, part in PARTS.items():
        known = results.setdefault(name, {})
        if known.get(END, {}).get("is_quick") in (False, stage.is_quick):
            continue
        for failed in [key for key, figures in known.items() if "failed" in figures]:
            del known[failed]
        limit_s = part.limit_s * (10 if stage.is_rehearsal else 0.5 if stage.is_quick else 1)
        for key, figures in _run_apart(name, stage._replace(known=frozenset(known)), limit_s=limit_s):
            known[key] = figures
            tell(f"{name:10} {key:48} {_shorten(figures)}")
            write_record(record, config=config, results=results)
    return results


def _run_apart(name: str, stage: Stage, *, limit_s: float) -> Iterator[tuple[str, Figures]]:
    """The figures of a part as they come from its process, and at last how it ended."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_be_part, args=(name, stage, answers), daemon=True)
    process.start()
    end_s = time.monotonic() + limit_s
    try:
        while (answer := _next_answer(answers, process, until_s=end_s)) is not None:
            yield answer
    except TimeoutError as error:
        yield END, {"failed": f"{error} after {limit_s:.0f} s"}
    finally:
        process.kill()
        process.join()


def _next_answer(answers: Any, process: Any, *, until_s: float) -> tuple[str, Figures] | None:
    """None at the end. TimeoutError when the time is up or the process died without a word."""
    while time.monotonic() < until_s:
        is_alive = process.is_alive()
        try:
            answer: tuple[str, Figures] | None = answers.get(timeout=1.0)
            return answer
        except Empty:
            if not is_alive:
                raise TimeoutError(f"process ended with status {process.exitcode}") from None
    raise TimeoutError("stopped")


def _be_part(name: str, stage: Stage, answers: Any) -> None:
    try:
        for key, figures in PARTS[name].measure(stage):
            answers.put((key, figures))
        answers.put((END, {"is_quick": stage.is_quick}))
    except BaseException as error:  # whatever it is: it is an outcome too
        where = traceback.format_exc(limit=-3).strip().splitlines()
        answers.put((END, {"failed": f"{type(error).__name__}: {error}", "where": where}))
    answers.put(None)


def _read_results(record: Path, config: Figures) -> Results:
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    now = {"hardware": describe_hardware(), "config": config}
    results: Results = found["results"] if all(found.get(key) == value for key, value in now.items()) else {}
    return results


def _digest_code() -> str:
    """Of all modules of the package: a commit does not tell what was changed since."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _shorten(figures: Figures) -> str:
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in figures.items()}
    return "  ".join(f"{key} {value}" for key, value in shown.items() if not isinstance(value, dict | list))
