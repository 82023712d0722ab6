"""The commands as users start them: in processes of their own, by path, by module, by launcher."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmae_scale.config.run_file import read_run
from tests.small import SMALL

LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))  # of this environment, also without activation
MACHINE = ["torch_autocast.enabled=auto", "torch_autocast.dtype=auto"]


def start(
    command: list[str], *, folder: Path, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "", **(environment or {})}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=540)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set, made by the command of the README."""
    repository = Path(__file__).resolve().parent.parent
    shards = tmp_path_factory.mktemp("shards") / "digits"
    done = start(
        [sys.executable, "data_prep/make_shards.py", "--source", "digits", "--out", str(shards)],
        folder=repository,
    )
    assert done.returncode == 0, done.stderr
    return shards


@pytest.fixture
def arguments(digits: Path, repository: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a small quickstart into `out`, from anywhere."""

    def build(*overrides: str, out: str = "run") -> list[str]:
        data = [f"cmae.data.shards={digits}/train", f"cmae.data.val_shards={digits}/val"]
        return [
            *("--deepspeed_config", str(repository / "ds_configs" / "quickstart.json")),
            *("--set", *SMALL, *data, *overrides),
            *("--out", str(tmp_path / out)),
        ]

    return build


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOSSES = ("step", "samples", "loss", "pixel", "contrast", "lr", "momentum")


def losses_of(folder: Path) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in LOSSES) for line in read_lines(folder)]


@pytest.mark.slow
def test_the_launcher_trains_on_two_ranks_and_leaves_everything(
    arguments: Callable[..., list[str]], repository: Path, tmp_path: Path
) -> None:
    command = [LAUNCHER, "--num_gpus", "2", "cmae_scale/pretrain.py"]
    overrides = ["zero_optimization.stage=2", "cmae.schedule.duration=6st", "csv_monitor.enabled=true"]
    overrides += [f"csv_monitor.output_path={tmp_path}/csv", "csv_monitor.job_name=digits"]
    overrides += [*MACHINE, "cmae.model.attention=explicit"]
    done = start([*command, *arguments(*overrides)], folder=repository, environment={"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    lines = read_lines(run)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["bad_samples"] == 0 and line["grad_norm"] > 0 for line in lines)
    assert done.stdout.count("precision: ") == 1
    assert "attention explicit" in done.stdout
    assert '"auto"' not in (run / "config.json").read_text().replace('"resume": "auto"', "")
    for name in ("encoder/model.safetensors", "encoder/config.json", "pictures/curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "pictures" / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "latest").read_text() == "step_00000006"
    assert list((tmp_path / "csv").rglob("*loss*.csv"))
    assert read_run(run / "config.json").cmae.out == str(run)


@pytest.fixture
def pretrain(on_ranks: Callable[..., list[Any]]) -> Callable[..., list[int]]:
    """Exit statuses of the command on each rank, without a launcher's half minute."""

    def run(arguments: list[str], *, ranks: int = 1) -> list[int]:
        from cmae_scale.pretrain import main

        return on_ranks(lambda: main(arguments), ranks=ranks)

    return run


@pytest.mark.dist
def test_the_exported_encoder_gives_timm_the_same_features(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    import timm
    from safetensors.torch import load_file

    from cmae_scale.models import build_cmae

    assert pretrain(arguments("cmae.schedule.duration=3st", "zero_optimization.stage=3"), ranks=2) == [0, 0]
    exported = tmp_path / "run" / "encoder"
    cfg = read_run(tmp_path / "run" / "config.json").cmae
    ours = build_cmae(cfg).online_encoder
    ours.load_state_dict(load_file(exported / "model.safetensors"))
    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, cfg.views.img_px, cfg.views.img_px)
    with torch.no_grad():
        torch.testing.assert_close(ours(images, None), theirs.forward_features(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_a_hybrid_stopped_and_resumed_exports_what_straight_through_does(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    from cmae_scale.models import read_encoder
    from cmae_scale.models.hybrid import HybridEncoder

    settings = ["cmae.schedule.duration=4st", "zero_optimization.stage=3", "cmae.checkpoint.every=2st"]
    settings.append('cmae.model.conv={"dims": [8, 12], "depths": [1, 1]}')
    assert pretrain(arguments(*settings, out="straight"), ranks=2) == [0, 0]
    assert pretrain([*arguments(*settings, out="stopped"), "--stop_at", "2"], ranks=2) == [0, 0]
    assert pretrain(arguments(*settings, out="stopped"), ranks=2) == [0, 0]
    straight, resumed = (read_encoder(tmp_path / out / "encoder") for out in ("straight", "stopped"))
    assert isinstance(straight, HybridEncoder)
    expected = straight.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


@pytest.mark.slow_unless(workers=1)
@pytest.mark.dist
@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_and_resumed_equals_straight_through_bit_for_bit(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path, workers: int
) -> None:
    from safetensors.torch import load_file

    settings = ["cmae.schedule.duration=7st", "cmae.checkpoint.every=3st", f"cmae.data.workers={workers}"]
    assert pretrain(arguments(*settings, out="straight")) == [0]
    assert pretrain([*arguments(*settings, out="stopped"), "--stop_at", "3"]) == [0]
    assert not (tmp_path / "stopped" / "encoder").exists()
    other = [*settings[:2], f"cmae.data.workers={3 - workers}"]
    assert pretrain(arguments(*other, out="stopped")) == [0]
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    straight, resumed = (
        load_file(tmp_path / out / "encoder" / "model.safetensors") for out in ("straight", "stopped")
    )
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_on_all_and_the_same_command_goes_on(
    arguments: Callable[..., list[str]],
    pretrain: Callable[..., list[int]],
    on_ranks: Callable[..., list[Any]],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    from safetensors.torch import load_file

    settings = ["cmae.schedule.duration=6st", "cmae.checkpoint.every=100st", "zero_optimization.stage=2"]

    def interrupted() -> int:
        from cmae_scale.engine.metrics.logger import MetricsLogger
        from cmae_scale.pretrain import main

        original, added = MetricsLogger.add, []

        def add(self: Any, losses: Any) -> None:
            original(self, losses)
            added.append(None)
            if len(added) == 3 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), number)

        MetricsLogger.add = add
        return main(arguments(*settings, out="asked"))

    assert on_ranks(interrupted, ranks=2) == [75, 75]
    assert (tmp_path / "asked" / "checkpoints" / "latest").read_text() == "step_00000003"
    assert pretrain(arguments(*settings, out="asked"), ranks=2) == [0, 0]
    assert pretrain(arguments(*settings, out="never"), ranks=2) == [0, 0]
    asked, never = (load_file(tmp_path / out / "encoder" / "model.safetensors") for out in ("asked", "never"))
    assert all(torch.equal(asked[name], value) for name, value in never.items())


@pytest.mark.slow
@pytest.mark.dist
def test_the_written_config_gives_the_same_run(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    assert pretrain(arguments("cmae.schedule.duration=2st", *MACHINE, out="first")) == [0]
    again = ["--deepspeed_config", str(tmp_path / "first" / "config.json"), "--out", str(tmp_path / "second")]
    assert pretrain(again) == [0]
    assert losses_of(tmp_path / "second") == losses_of(tmp_path / "first")


@pytest.mark.slow
@pytest.mark.dist
def test_one_and_two_ranks_give_the_same_losses(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    settings = ["cmae.schedule.duration=4st", "torch_autocast.enabled=false"]
    assert pretrain(arguments(*settings, out="one")) == [0]
    assert pretrain(arguments(*settings, "zero_optimization.stage=2", out="two"), ranks=2) == [0, 0]
    one, two = (torch.tensor(losses_of(tmp_path / out)) for out in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.dist
def test_workers_and_restarts_change_no_loss(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    """The whole command, twice: straight through, and stopped and taken up by other numbers of workers."""

    def settings(workers: int) -> list[str]:
        same = ["cmae.schedule.duration=6st", "cmae.checkpoint.every=2st", "cmae.heads.norm=layer"]
        return [*same, "torch_autocast.enabled=false", f"cmae.data.workers={workers}"]

    assert pretrain(arguments(*settings(1), out="straight")) == [0]
    assert pretrain([*arguments(*settings(3), out="restarted"), "--stop_at", "2"]) == [0]
    assert pretrain([*arguments(*settings(2), out="restarted"), "--stop_at", "4"]) == [0]
    assert pretrain(arguments(*settings(4), out="restarted")) == [0]
    assert losses_of(tmp_path / "restarted") == losses_of(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.dist
def test_a_finished_run_started_again_stays_finished(
    arguments: Callable[..., list[str]], pretrain: Callable[..., list[int]], tmp_path: Path
) -> None:
    assert pretrain(arguments("cmae.schedule.duration=2st")) == [0]
    before = losses_of(tmp_path / "run")
    assert pretrain(arguments("cmae.schedule.duration=2st")) == [0]
    assert losses_of(tmp_path / "run") == before


@pytest.mark.dist
def test_what_plan_would_warn_of_is_in_the_log(
    arguments: Callable[..., list[str]],
    pretrain: Callable[..., list[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert pretrain(arguments("cmae.schedule.duration=2st", "cmae.schedule.warmup=5st")) == [0]
    told = (
        "warning: cmae.schedule.warmup 5st is 5 steps, the run has 2: the peak learning rate is never reached"
    )
    assert told in capfd.readouterr().out


@pytest.mark.dist
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cmae.data.shards=nowhere"], "nowhere holds no index.json: make its shards with"),
        (["train_batch_size=4096"], "the shards hold 1438 samples, fewer than train_batch_size (4096)"),
        (["train_micro_batch_size_per_gpu=48"], "write train_micro_batch_size_per_gpu=32"),
        (["cmae.model.attention=cudnn"], 'cmae.model.attention "cudnn" cannot run'),
        (["fp16.enabled=true", "torch_autocast.enabled=false"], "fp16 is not supported on your device"),
        (["optimizer.type=AdamX"], "DeepSpeed refuses these settings"),
        (
            ["zero_optimization.reduce_bucket_size=-5"],
            "zero_optimization.reduce_bucket_size: Input should be",
        ),
        (["cmae.out=/proc/nothing"], "cannot write into the run folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_one_sentence_with_status_2(
    arguments: Callable[..., list[str]], on_ranks: Callable[..., list[Any]], overrides: list[str], told: str
) -> None:
    def run() -> tuple[int, str]:
        import contextlib
        import io

        from deepspeed.accelerator import get_accelerator

        from cmae_scale.pretrain import main

        type(get_accelerator()).is_fp16_supported = lambda self: False  # some CPUs have it
        stderr = io.StringIO()
        line = arguments("cmae.schedule.duration=2st", *overrides)
        if overrides[0].startswith("cmae.out"):
            line = line[:-2]
        with contextlib.redirect_stderr(stderr):
            return main(line), stderr.getvalue()

    [(status, stderr)] = on_ranks(run, ranks=1)
    errors = [line for line in stderr.splitlines() if line.startswith("error")]
    assert status == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "module", ["cmae_scale.pretrain", "cmae_scale.plan", "data_prep.make_shards", "data_prep.check_shards"]
)
@pytest.mark.parametrize("way", ["by module", "by path"])
def test_help_has_examples(module: str, way: str, repository: Path, tmp_path: Path) -> None:
    path = repository / (module.replace(".", "/") + ".py")
    command = ["-m", module, "--help"] if way == "by module" else [str(path), "--help"]
    done = start([sys.executable, *command], folder=repository if way == "by module" else tmp_path)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_a_typo_is_told_before_torch_is_loaded(repository: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cmae_scale.pretrain import main\n"
        "status = main(['--deepspeed_config', 'ds_configs/vitl.json', '--set', 'cmae.mask.ratoi=1'])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = start([sys.executable, "-c", code], folder=repository)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "error: ds_configs/vitl.json: \"cmae.mask.ratoi\" is not a setting; did you mean 'ratio'?"
    ]


@pytest.mark.dist
def test_an_ordinary_step_runs_through_few_files(
    on_ranks: Callable[..., list[Any]], digits: Path, repository: Path, tmp_path: Path
) -> None:
    data = [f"cmae.data.shards={digits}/train", f"cmae.data.val_shards={digits}/val"]
    command = ["--deepspeed_config", str(repository / "ds_configs" / "quickstart.json"), "--stop_at", "5"]
    command += ["--out", str(tmp_path / "run"), "--set", *data, "cmae.monitor.log_every=100"]

    def trace() -> set[str]:
        from cmae_scale.engine.loop import Trainer
        from cmae_scale.pretrain import main

        package = str(Path(sys.modules["cmae_scale"].__file__ or "").parent)
        take, opened = Trainer.take, set[str]()

        def note(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(package):
                opened.add(frame.f_code.co_filename.removeprefix(package + "/"))

        def take_traced(self: Any, step: int, crops: Any) -> bool:
            sys.setprofile(note if step == 3 else None)  # of this thread: not of those that read data
            try:
                return take(self, step, crops)
            finally:
                sys.setprofile(None)

        Trainer.take = take_traced  # type: ignore[method-assign]
        assert main(command) == 0
        return opened

    (opened,) = on_ranks(trace, ranks=1)
    assert {"engine/loop.py", "engine/pretraining.py", "engine/ema.py", "losses/pixels.py"} <= opened
    assert len(opened) <= 25, " ".join(sorted(opened))
