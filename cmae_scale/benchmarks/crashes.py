"""The proof that a run survives kill -9: killed again and again, it ends as the run that never was.

The ranks are started without a launcher, as a launcher would start them, so that nobody but the run itself
ends the ranks that are left when one is killed.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cmae_scale.core.errors import DataError
from cmae_scale.core.files import PART
from cmae_scale.core.world import find_free_port

Moment = Literal["starting", "training", "saving"]

END_S = 60.0  # that the other ranks of a killed one have to end; they need the watch's few seconds
MEET_S = 20.0  # while ranks are still starting they do not know each other: then a launcher ends them


@dataclass(frozen=True)
class Job:
    """A run as a command on `ranks` processes of this machine, writing to `out`."""

    module: str
    arguments: tuple[str, ...]
    ranks: int
    out: Path
    timeout_s: float = 3600.0

    def start(self) -> "list[subprocess.Popen[bytes]]":
        """Its processes; what they print goes to OUT/../log."""
        port = find_free_port()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", self.module, *self.arguments, "--out", str(self.out)]
        with (self.out.parent / "log").open("ab") as log:
            return [
                subprocess.Popen(  # noqa: S603
                    command,
                    env={
                        **os.environ,
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(self.ranks),
                        "LOCAL_WORLD_SIZE": str(self.ranks),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    stdout=log,
                    stderr=log,
                )
                for rank in range(self.ranks)
            ]


@dataclass(frozen=True)
class Kill:
    """Whom to kill (a rank, or None for the whole run), and when: so many seconds after the moment."""

    victim: int | None
    moment: Moment
    delay_s: float
    saves_before: int  # how many saves to let pass first, for the moment "saving"

    def __str__(self) -> str:
        """For instance: rank 1, saving."""
        return f"{'whole run' if self.victim is None else f'rank {self.victim}'}, {self.moment}"


@dataclass(frozen=True)
class Outcome:
    """What a kill did. `is_late`: the run had ended before."""

    kill: Kill
    is_late: bool
    was_saving: bool
    newest: str  # state on disk afterwards
    others_s: float | None  # until the other ranks had ended by themselves
    statuses: tuple[int, ...]

    def __str__(self) -> str:
        """One line of a table."""
        if self.kill.victim is None:
            others = ""
        elif self.others_s is None:
            others = "others were starting, ended as by a launcher"
        else:
            others = f"others ended after {self.others_s:4.1f} s"
        return f"{self.kill!s:20} newest checkpoint {self.newest:15} {others}".rstrip()


def draw_crashes(seed: int, *, ranks: int, start_s: float, save_s: float) -> Iterator[Kill]:
    """Kills without end, of which a third come while a state is being written."""
    rng = random.Random(seed)  # noqa: S311
    victims: list[int | None] = [None, *range(ranks)]
    while True:
        moment: Moment = rng.choice(("starting", "training", "training", "training", "saving", "saving"))
        longest_s = {"starting": start_s, "training": 4.0, "saving": save_s}[moment]
        yield Kill(rng.choice(victims), moment, rng.uniform(0, longest_s), rng.randrange(3))


def prove_survival(job: Job, *, kills: int, seed: int, tell: Callable[[str], None]) -> list[Outcome]:
    """The outcomes of `kills` kills of `job` in as many runs as that takes, `tell` being told of each.

    Raises DataError when a rank hangs after another was killed, or when a run ends with other metrics or
    weights than the run that was never killed.
    """
    with tempfile.TemporaryDirectory(dir=job.out.parent if job.out.parent.is_dir() else None) as folder:
        reference = replace(job, out=Path(folder) / "reference" / "run")
        expected, start_s, save_s = _run_unharmed(reference)
        tell(f"never killed: {len(expected[0])} lines of metrics, first step after {start_s:.0f} s")
        drawn = draw_crashes(seed, ranks=job.ranks, start_s=start_s, save_s=save_s)
        outcomes: list[Outcome] = []
        runs = 0
        while len(outcomes) < kills:
            runs += 1
            victim = replace(job, out=Path(folder) / f"killed_{runs}" / "run")
            while True:
                wanted = next(drawn) if len(outcomes) < kills else None
                outcome = _run_once(victim, wanted, last=_newest(reference.out))
                if outcome is None or outcome.is_late:
                    break
                outcomes.append(outcome)
                tell(f"kill {len(outcomes):3}  {outcome}")
            _compare(victim, expected)
            tell(f"run {runs} ended as the one that was never killed")
        return outcomes


def _run_unharmed(job: Job) -> tuple[tuple[list[Any], dict[str, str]], float, float]:
    processes = job.start()
    started_s = time.monotonic()
    first_s = saving_s = 0.0
    longest_save_s = 0.05
    while any(process.poll() is None for process in processes):
        now_s = time.monotonic() - started_s
        if now_s > job.timeout_s:
            _end_all(processes)
            raise DataError(f"the run took more than {job.timeout_s:.0f} s: see {job.out.parent / 'log'}")
        if not first_s and _size(job.out / "metrics.jsonl"):
            first_s = now_s
        if _is_saving(job.out):
            saving_s = saving_s or now_s
        elif saving_s:
            longest_save_s, saving_s = max(longest_save_s, now_s - saving_s), 0.0
        time.sleep(0.002)
    if any(process.returncode for process in processes):
        raise DataError(f"the run failed without being killed: {_tail(job)}")
    return _results(job), first_s, longest_save_s


def _run_once(job: Job, kill: Kill | None, *, last: str) -> Outcome | None:
    """Start the command once more. None when it was left to end.

    `last` is the state that training ends with. From then on rank 0 alone has work left, the export, and
    the others may end well whatever happens to it.
    """
    lines = _size(job.out / "metrics.jsonl")
    processes = job.start()
    started_s = time.monotonic()
    if kill is None:
        for process in processes:
            process.wait(job.timeout_s)
        if any(process.returncode for process in processes):
            raise DataError(f"the run failed after its kills: {_tail(job)}")
        return None
    _await(kill, job, processes, lines=lines, started_s=started_s)
    is_late = all(process.poll() is not None for process in processes)
    was_saving = _is_saving(job.out)
    for rank, process in enumerate(processes):
        if kill.victim is None or rank == kill.victim:
            process.kill()
    killed_s = time.monotonic()
    others_s = None
    if kill.victim is not None:
        for rank, process in enumerate(processes):
            try:
                process.wait(MEET_S if kill.moment == "starting" else END_S)
            except subprocess.TimeoutExpired:
                _end_all(processes)
                if kill.moment == "starting":
                    break
                raise DataError(
                    f"rank {rank} hung after rank {kill.victim} was killed: {_tail(job)}"
                ) from None
        else:
            others_s = time.monotonic() - killed_s
    statuses = tuple(process.wait() for process in processes)
    is_late = is_late or not any(statuses)
    if not is_late and kill.victim is not None and 0 in statuses and _newest(job.out) != last:
        raise DataError(f"a rank ended well although rank {kill.victim} was killed: {_tail(job)}")
    return Outcome(kill, is_late, was_saving, _newest(job.out), others_s, statuses)


def _await(
    kill: Kill, job: Job, processes: "Sequence[subprocess.Popen[bytes]]", *, lines: int, started_s: float
) -> None:
    """Wait for the moment of the kill, or for the end of the run."""
    # a save that was cut short before this start has left its part behind
    saves_left, was_saving = kill.saves_before, _is_saving(job.out)
    while all(process.poll() is None for process in processes):
        is_saving = _is_saving(job.out)
        has_begun = _size(job.out / "metrics.jsonl") != lines and time.monotonic() > started_s + 1
        match kill.moment:
            case "starting":
                break
            case "training" if has_begun:
                break
            case "saving" if is_saving and not was_saving:
                if not saves_left:
                    break
                saves_left -= 1
        was_saving = is_saving
        time.sleep(0.002)
    deadline_s = time.monotonic() + kill.delay_s
    while time.monotonic() < deadline_s and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def _results(job: Job) -> tuple[list[Any], dict[str, str]]:
    """Lines of metrics without what only tells time and memory, and a digest of each exported weight."""
    import hashlib

    from safetensors.torch import load_file

    lines = [
        {name: value for name, value in json.loads(line).items() if not is_timing(name)}
        for line in (job.out / "metrics.jsonl").read_text().splitlines()
    ]
    digests = {
        f"{path.parent.name}/{name}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for path in sorted(job.out.glob("*/model.safetensors"))
        for name, value in load_file(path).items()
    }
    return lines, digests


def is_timing(name: str) -> bool:
    """Whether a metric says how fast or how large a run is: two equal runs differ in it."""
    return name == "mfu" or name.endswith(("_s", "_ms", "_gib"))


def _compare(job: Job, expected: tuple[list[Any], dict[str, str]]) -> None:
    lines, digests = _results(job)
    if [line["step"] for line in lines] != [line["step"] for line in expected[0]]:
        raise DataError(f"{job.out}: metrics.jsonl has other steps than that of the run never killed")
    for line, other in zip(lines, expected[0], strict=True):
        if line != other:
            raise DataError(f"{job.out}: the metrics differ: {line}, and {other} when never killed")
    different = [name for name in expected[1] if digests.get(name) != expected[1][name]]
    if different or digests.keys() != expected[1].keys():
        raise DataError(f"{job.out}: the weights differ: {', '.join(different[:5])}")


def _is_saving(out: Path) -> bool:
    try:
        return any(name.endswith(PART) for name in os.listdir(out / "checkpoints"))  # noqa: PTH208
    except OSError:
        return False


def _newest(out: Path) -> str:
    names = sorted(path.name for path in (out / "checkpoints").glob("step_*") if not path.suffix)
    return names[-1] if names else "none"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(job: Job) -> str:
    text = (job.out.parent / "log").read_text(errors="replace")
    kept = Path(tempfile.gettempdir()) / "killed_run.log"
    shutil.copy(job.out.parent / "log", kept)
    return f"{' / '.join(text.splitlines()[-3:])} (whole log: {kept})"


def _end_all(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
