"""Whole runs that are killed, asked to leave, stalled or out of disk, and the same command again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.core.world import find_free_port
from tests.small import SMALL

LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))  # of this environment, also without activation
STEPS = 8


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory, repository_path: Path) -> Path:
    shards = tmp_path_factory.mktemp("shards") / "digits"
    command = [sys.executable, "data_prep/make_shards.py", "--source", "digits", "--out", str(shards)]
    subprocess.run(command, cwd=repository_path, check=True, capture_output=True)
    return shards


@pytest.fixture(scope="session")
def repository_path() -> Path:
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def arguments(digits: Path, tmp_path: Path, repository_path: Path) -> Callable[..., list[str]]:
    """`arguments("cmae.seed=1", out="run")`: those of a small run of a few steps on digits."""

    def build(*overrides: str, out: Path | str = "run") -> list[str]:
        return small_run(*overrides, digits=digits, repository=repository_path, out=tmp_path / out)

    return build


def small_run(*overrides: str, digits: Path, repository: Path, out: Path) -> list[str]:
    data = [f"cmae.data.shards={digits}/train", f"cmae.data.val_shards={digits}/val"]
    length = [f"cmae.schedule.duration={STEPS}st", "cmae.checkpoint.every=3st"]
    return [
        "--deepspeed_config",
        str(repository / "ds_configs" / "quickstart.json"),
        *("--set", *data, *SMALL, *length, *overrides),
        *("--out", str(out)),
    ]


@pytest.fixture(scope="session")
def pretrain(let_ranks_end: Callable[..., Any]) -> Callable[..., Any]:
    """`pretrain(arguments, ranks=2, before=...)`: how ranks of the command end, without a launcher."""

    def run(
        arguments: list[str], *, ranks: int = 2, before: Callable[[], None] = lambda: None, **more: Any
    ) -> Any:
        def be() -> int:
            from cmae_scale.pretrain import main

            before()
            return main(arguments)

        return let_ranks_end(be, ranks=ranks, **more)

    return run


@pytest.fixture(scope="session")
def unharmed(
    pretrain: Callable[..., Any],
    digits: Path,
    repository_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run on two ranks that nothing befell."""
    out = tmp_path_factory.mktemp("unharmed") / "run"
    command = small_run(digits=digits, repository=repository_path, out=out)
    assert [end.status for end in pretrain(command)] == [0, 0]
    return out


def at_step(step: int, act: Callable[[], None], *, rank: int | None = None) -> Callable[[], None]:
    """For `before`: have a rank `act` when it has the gradients of `step`, once per run folder."""

    def patch() -> None:
        from cmae_scale.engine.pretraining import Pretraining

        original = Pretraining.take_step

        def take_step(self: Any, crops: Any, *, step: int, update: Any) -> Any:
            def act_and_update(losses: Any) -> bool:
                mark = self.state.run.out / f"acted_{os.environ['RANK']}"
                if step == at and rank in (None, int(os.environ["RANK"])) and not mark.exists():
                    mark.touch()
                    act()
                return bool(update(losses))

            return original(self, crops, step=step, update=act_and_update)

        at = step
        Pretraining.take_step = take_step  # type: ignore[method-assign]

    return patch


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def read_exit(folder: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads((folder / "exit.json").read_text())
    return note


def assert_same_end(folder: Path, unharmed: Path, *, with_metrics: bool = True) -> None:
    from safetensors.torch import load_file

    from cmae_scale.benchmarks.crashes import is_timing

    ours, theirs = (load_file(path / "encoder" / "model.safetensors") for path in (folder, unharmed))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    if with_metrics:
        lines = [
            [
                {name: value for name, value in json.loads(line).items() if not is_timing(name)}
                for line in (path / "metrics.jsonl").read_text().splitlines()
            ]
            for path in (folder, unharmed)
        ]
        assert lines[0] == lines[1]


@pytest.mark.slow_unless(victim=1)
@pytest.mark.dist
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_a_rank_is_told_and_the_same_command_ends_as_if_it_had_not_been(
    pretrain: Callable[..., Any],
    arguments: Callable[..., list[str]],
    unharmed: Path,
    tmp_path: Path,
    victim: int,
) -> None:
    kill = at_step(4, send(signal.SIGKILL), rank=victim)
    ended = pretrain(arguments(), before=kill)
    assert ended[victim].status == -signal.SIGKILL
    assert ended[1 - victim].status == 1
    assert f"rank {victim}" in ended[1 - victim].stderr
    assert "died" in ended[1 - victim].stderr
    note = read_exit(tmp_path / "run")
    assert (note["status"], note["state"]) == (1, "step_00000003")
    assert f"rank {victim}" in note["cause"]
    assert [end.status for end in pretrain(arguments(), before=kill)] == [0, 0]
    assert_same_end(tmp_path / "run", unharmed)
    assert read_exit(tmp_path / "run")["status"] == 0


@pytest.mark.slow
@pytest.mark.dist
def test_two_random_kills_of_the_whole_run_change_nothing(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    from cmae_scale.benchmarks.crashes import Job, prove_survival

    told: list[str] = []
    long = arguments("cmae.schedule.duration=40st")[:-2]
    job = Job("cmae_scale.pretrain", tuple(long), 2, tmp_path / "kill")
    outcomes = prove_survival(job, kills=2, seed=3, tell=told.append)
    assert len(outcomes) == 2
    assert told[-1].endswith("ended as the one that was never killed")


@pytest.mark.slow_unless(number=signal.SIGTERM)
@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_asked_to_leave_all_ranks_save_together_and_the_same_command_goes_on(
    pretrain: Callable[..., Any],
    arguments: Callable[..., list[str]],
    unharmed: Path,
    tmp_path: Path,
    number: signal.Signals,
    status: int,
) -> None:
    ended = pretrain(arguments(), before=at_step(3, send(number), rank=1))
    assert [end.status for end in ended] == [status, status]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"
    note = read_exit(tmp_path / "run")
    assert (note["status"], note["step"], note["state"]) == (status, 4, "step_00000004")
    assert number.name in note["cause"]
    assert [end.status for end in pretrain(arguments())] == [0, 0]
    assert_same_end(tmp_path / "run", unharmed, with_metrics=False)  # it has a line more, where it stopped


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_while_saving_waits_for_the_save(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def patch() -> None:
        from cmae_scale.engine.train_state import TrainState

        original = TrainState.begin_save

        def begin_save(self: Any, step: int, **options: Any) -> Any:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, step, **options)

        TrainState.begin_save = begin_save  # type: ignore[method-assign]

    ended = pretrain(arguments(), before=patch)
    assert [end.status for end in ended] == [75, 75]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000003"


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_one_rank_ends_the_wait_of_another_for_data(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The store of rank 1 no longer answers; rank 0 waits for it in a collective and gets the signal."""

    def patch() -> None:
        from cmae_scale.data import stream

        original = stream.read_raw_batches

        def read(*args: Any, **options: Any) -> Iterator[Any]:
            for raw in original(*args, **options):
                if raw.step == 4 and os.environ["RANK"] == "1":
                    time.sleep(1000)
                yield raw

        stream.read_raw_batches = read

    def ask(pids: list[int]) -> None:
        await_line(tmp_path / "run" / "checkpoints" / "latest")
        time.sleep(2)
        os.kill(pids[0], signal.SIGTERM)

    ended = pretrain(arguments(), before=patch, meanwhile=ask)
    assert [end.status for end in ended] == [75, 75]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"


@pytest.mark.slow
def test_a_mount_that_hangs_is_named_by_what_the_run_waits_for(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def patch() -> None:
        from cmae_scale.data.shard_set import Shard

        original = Shard.read

        def read(self: Any, *args: Any) -> Any:
            if os.environ["RANK"] == "1" and self.info.name.endswith(".tar"):
                time.sleep(1000)
            return original(self, *args)

        Shard.read = read  # type: ignore[method-assign]

    ended = pretrain(arguments("cmae.faults.step_timeout_s=5.0"), before=patch)
    assert all(end.status not in (0, 75) for end in ended)
    assert any("rank 1" in end.stderr and "reading data" in end.stderr for end in ended)


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_while_the_engine_is_being_built_is_not_lost(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def patch() -> None:
        from cmae_scale.engine import train_state

        original = train_state.start_engine

        def start_engine(*args: Any, **options: Any) -> Any:
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **options)

        train_state.start_engine = start_engine  # type: ignore[attr-defined]

    ended = pretrain(arguments(), before=patch)
    assert [end.status for end in ended] == [75, 75]
    assert "after step 0" in ended[0].stderr


@pytest.mark.slow
def test_a_signal_while_importing_ends_the_command_at_once(
    arguments: Callable[..., list[str]], repository_path: Path
) -> None:
    program = (
        "import sys, cmae_scale.pretrain as p\n"
        "enter = p.StopRequest.__enter__\n"
        "p.StopRequest.__enter__ = lambda stop: (enter(stop), print('here', flush=True))[0]\n"
        "sys.exit(p.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments()],
        cwd=repository_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "asked to leave (SIGTERM) before the first step" in stderr


@pytest.mark.slow
@pytest.mark.dist
def test_an_error_of_one_rank_ends_the_other_with_its_words(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("by nothing")

    ended = pretrain(arguments(), before=at_step(4, fail, rank=1))
    assert [end.status for end in ended] == [1, 1]
    assert "rank 1" in ended[0].stderr
    assert "failed: ZeroDivisionError: by nothing" in ended[0].stderr
    assert "ZeroDivisionError" in read_exit(tmp_path / "run")["cause"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_step_that_never_ends_leaves_stacks_and_its_name(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = pretrain(
        arguments("cmae.faults.step_timeout_s=15.0"), before=at_step(4, lambda: time.sleep(1000), rank=1)
    )
    assert [end.status for end in ended] == [1, 1]
    assert re.search(r"no progress for \d+ s: rank 1 \(", ended[0].stderr)
    assert "computing gradients, step 4" in ended[0].stderr
    assert "act_and_update" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_a_second_run_in_the_same_folder_is_refused(
    pretrain: Callable[..., Any],
    arguments: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cmae_scale.core.files import hold

    monkeypatch.setattr("cmae_scale.engine.process.lifecycle.WAIT_FOR_LOCK_S", 0.5)
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run" / ".lock", wait=False) as is_held:
        assert is_held
        (tmp_path / "run" / ".lock").write_text("process 7 on node3")
        ended = pretrain(arguments())
    assert [end.status for end in ended] == [2, 2]
    assert "another run is at work in" in ended[0].stderr
    assert "(process 7 on node3)" in ended[0].stderr
    assert [end.status for end in pretrain(arguments())] == [0, 0]  # a lock without its process is none


@pytest.mark.slow_unless(rank=1)
@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_that_one_rank_cannot_write_is_told_by_all_at_once(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], rank: int
) -> None:
    def patch() -> None:
        from cmae_scale.engine.process import lifecycle

        def refuse(path: Path, text: str) -> None:
            raise OSError(30, "Read-only file system")

        if os.environ["RANK"] == str(rank):
            lifecycle.write_text = refuse

    ended = pretrain(arguments(), before=patch)
    assert [end.status for end in ended] == [2, 2]
    assert "cannot write into the run folder" in ended[0].stderr
    assert f"rank {rank} on " in ended[0].stderr


@pytest.mark.dist
def test_ranks_that_see_different_folders_are_told(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    def patch() -> None:
        os.chdir(tmp_path / f"node{os.environ['RANK']}")

    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir()
    line = [*arguments()[:-2], "--out", "run"]
    ended = pretrain(line, before=patch)
    assert [end.status for end in ended] == [2, 2]
    assert "rank 1 does not see in run what rank 0 writes there" in ended[0].stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a folder on a disk of its own."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.dist
def test_a_disk_that_fills_up_ends_neither_training_nor_older_states(
    pretrain: Callable[..., Any],
    arguments: Callable[..., list[str]],
    small_disk: Callable[[int], Path],
    unharmed: Path,
) -> None:
    disk = small_disk(40_000)

    def fill() -> None:
        with (disk / "rest").open("wb") as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass

    ended = pretrain(arguments(out=disk / "run"), before=at_step(4, fill, rank=0))
    states = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert "step_00000003" in states
    assert not [name for name in states if name.endswith(".part")]
    assert [end.status for end in ended] in ([2, 0], [2, 1])  # all steps were done; the encoder had no room
    assert "No space left on device" in ended[0].stderr
    (disk / "rest").unlink()
    assert [end.status for end in pretrain(arguments(out=disk / "run"))] == [0, 0]
    assert_same_end(disk / "run", unharmed)


@pytest.mark.dist
def test_a_read_only_disk_is_told_at_the_start(
    pretrain: Callable[..., Any], arguments: Callable[..., list[str]], small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1000)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    ended = pretrain(arguments(out=disk / "run"))
    assert [end.status for end in ended] == [2, 2]
    assert "Read-only file system" in ended[0].stderr


class Launched:
    """A launcher as a user starts it, in a process group of its own; what it prints is in `log`."""

    def __init__(self, command: list[str], *, folder: Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def children(self, word: str) -> list[Any]:
        """Processes below it that have `word` in their command line."""
        import psutil

        family = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in family if one.is_running() and any(word in part for part in one.cmdline())]

    def wait(self, timeout_s: float = 300) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            for one in self.children("") if self.process.poll() is None else []:
                one.kill()
            self.process.kill()


def await_line(path: Path, *, timeout_s: float = 500) -> None:
    """Wait for the first line of metrics."""
    deadline_s = time.monotonic() + timeout_s
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline_s, f"no line in {path}"
        time.sleep(0.05)


LONG = ("cmae.schedule.duration=3000st", "cmae.checkpoint.every=2000st")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["SIGTERM to the process that starts the ranks", "Ctrl-C", "the file stop"])
def test_the_deepspeed_launcher_asked_to_leave(
    arguments: Callable[..., list[str]], repository_path: Path, tmp_path: Path, way: str
) -> None:
    command = [LAUNCHER, "--num_gpus", "2", "--master_port", str(find_free_port()), "cmae_scale/pretrain.py"]
    launched = Launched([*command, *arguments(*LONG)], folder=repository_path, log=tmp_path / "log")
    run = tmp_path / "run"
    await_line(run / "metrics.jsonl")
    match way:
        case "Ctrl-C":
            os.killpg(launched.process.pid, signal.SIGINT)
        case "the file stop":
            (run / "stop").touch()
        case _:
            [starter] = launched.children("deepspeed.launcher.launch")
            starter.send_signal(signal.SIGTERM)
    status = launched.wait()
    assert status != 0, launched.log.read_text()
    note = read_exit(run)
    assert note["status"] == (130 if way == "Ctrl-C" else 75), launched.log.read_text()
    assert note["state"] == f"step_{note['step']:08d}"
    if way == "the file stop":
        assert status == 75  # nobody signalled the launcher: it passes on what its ranks say


@pytest.mark.slow
def test_of_two_nodes_one_is_lost_and_the_same_command_goes_on(
    arguments: Callable[..., list[str]], repository_path: Path, tmp_path: Path
) -> None:
    """Two agents of torchrun with a rank each, as on two machines; then two of the deepspeed launcher."""
    run, port = tmp_path / "run", str(find_free_port())

    def start(node: int, *overrides: str) -> Launched:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        place = ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port]
        command = [*torchrun, *place, "cmae_scale/pretrain.py", *arguments(*overrides)]
        return Launched(command, folder=repository_path, log=tmp_path / f"log_{node}")

    nodes = [start(node, *LONG, "cmae.checkpoint.every=5st") for node in range(2)]
    await_line(run / "metrics.jsonl")
    while not list((run / "checkpoints").glob("step_*5")):
        time.sleep(0.05)
    for rank in nodes[1].children("pretrain.py"):  # the machine of rank 1 is gone: agent and rank
        nodes[1].process.kill()
        rank.kill()
    assert nodes[0].wait() != 0
    assert "rank 1 (" in nodes[0].log.read_text()
    assert "died while" in nodes[0].log.read_text()
    assert "rank 1 (" in read_exit(run)["cause"]
    done = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    end = f"cmae.schedule.duration={done + 20}st"
    del nodes
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=1\ntwo slots=1\n")
    port = str(find_free_port())

    def start_deepspeed(node: int) -> Launched:
        launcher = [LAUNCHER, "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)]
        place = ["--master_addr", "127.0.0.1", "--master_port", port]
        # the schedule is another one, but that is no matter here
        command = [*launcher, *place, "cmae_scale/pretrain.py", *arguments(end)]
        return Launched(command, folder=repository_path, log=tmp_path / f"log_{node}")

    again = [start_deepspeed(node) for node in range(2)]
    assert [node.wait() for node in again] == [0, 0], again[0].log.read_text()
    assert "resumed at step" in again[0].log.read_text()
    assert read_exit(run)["status"] == 0


FAKE_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
wait
"""
FAKE_SCONTROL = """#!/bin/bash
echo "$@" >> "$CALLS"
"""


@pytest.mark.slow
def test_the_documented_batch_script_saves_and_queues_itself_again(
    arguments: Callable[..., list[str]], repository_path: Path, tmp_path: Path
) -> None:
    """Slurm is played by two scripts; the batch shell gets its warning as Slurm sends it."""
    page = (repository_path / "docs" / "clusters.md").read_text()
    script = "#!/bin/bash\n" + page.split("```bash\n#!/bin/bash\n")[1].split("```")[0]
    command, run = arguments(*LONG), tmp_path / "run"
    for old, new in (
        ("RUN=runs/vitl", f"RUN={run}"),
        ("--deepspeed_config ds_configs/vitl.json --out $RUN", " ".join(command)),
    ):
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "job.sh").write_text(script)
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": "17",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        job = Launched(["bash", str(tmp_path / "job.sh")], folder=repository_path, log=tmp_path / "log")
    await_line(run / "metrics.jsonl")
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 0, job.log.read_text()
    assert (tmp_path / "calls").read_text().splitlines() == ["requeue 17"]
    note = read_exit(run)
    assert (note["status"], note["state"]) == (75, f"step_{note['step']:08d}")
