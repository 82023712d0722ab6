"""The command that says what a run will be: as users start it, and what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.config.batches import plan_batch
from cmae_scale.config.run_file import read_run
from cmae_scale.plan import main
from cmae_scale.planning.forecast import assume_precision, describe_job
from cmae_scale.sizing.memory import plan_moments, predict_peak

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = sorted((REPOSITORY / "ds_configs").glob("*.json"))
IMAGENET = ["--images", "1281167"]


def run_plan(capsys: pytest.CaptureFixture[str], config: str, *arguments: str) -> str:
    assert main(["--deepspeed_config", str(REPOSITORY / "ds_configs" / config), *arguments]) == 0
    return capsys.readouterr().out


def read_plan(capsys: pytest.CaptureFixture[str], config: str, *arguments: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(run_plan(capsys, config, "--json", *arguments))
    return plan


def warnings_of(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    plan = read_plan(capsys, "vitb.json", *IMAGENET, "--gpus", "8", "--set", *overrides)
    return list(plan["warnings"])


@pytest.mark.parametrize("way", [["-m", "cmae_scale.plan"], ["cmae_scale/plan.py"]], ids=["module", "path"])
def test_it_runs_by_module_and_by_path_and_loads_no_torch(way: list[str]) -> None:
    config = ["--deepspeed_config", "ds_configs/vitl.json", "--gpu", "H200", "--gpus", "8", *IMAGENET]
    code = (
        "import runpy, sys; sys.argv[0:1] = []; "
        + ("runpy.run_module(sys.argv[0], run_name='x')" if way[0] == "-m" else "runpy.run_path(sys.argv[0])")
        + "['main'](sys.argv[1:]); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, way[-1], *config], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ds_configs/vitl.json: CMAE vit_large on 8 x H200")
    assert len(done.stdout.splitlines()) <= 45
    assert max(map(len, done.stdout.splitlines())) < 220


def test_help_waits_for_no_library() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cmae_scale.plan", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "cmae_scale" in imported
    assert not imported & {"torch", "numpy", "pydantic", "deepspeed"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", ["1", "8", "32"])
def test_every_shipped_run_fits_an_a100_as_it_is(
    config: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--images", "1438"] if config.stem == "quickstart" else IMAGENET
    plan = read_plan(capsys, config.name, *images, "--gpu", "A100", "--gpus", gpus)
    assert plan["own"]["fits"]
    assert plan["recommended"]["largest_micro_batch"] >= plan["batch"]["micro"]
    assert plan["warnings"] == []


def test_the_amounts_are_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*IMAGENET, "--gpu", "H100", "--gpus", "8", "--mfu", "0.4", "--price", "2"]
    plan = read_plan(capsys, "vitb.json", *arguments)
    estimate = plan["outlook"]
    assert estimate["steps"] == 300 * (1281167 // 4096)
    assert estimate["images"] == estimate["steps"] * 4096
    seconds = estimate["images"] * plan["training_flops_per_image"] / (8 * 989e12 * 0.4)
    assert estimate["hours"] == pytest.approx(seconds / 3600)
    assert estimate["cost"] == pytest.approx(2 * 8 * seconds / 3600)
    assert estimate["images_per_s"] == pytest.approx(estimate["images"] / seconds)
    assert estimate["cost_per_1000_images"] == pytest.approx(1000 * estimate["cost"] / estimate["images"])
    assert plan["parameters"]["trained"] == 121_118_208
    page = run_plan(capsys, "vitb.json", *arguments)
    assert "121.12 M" in page
    assert "40% MFU" in page


def test_the_largest_micro_batch_keeps_the_batch_and_is_the_largest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*IMAGENET, "--gpu", "RTX 3090", "--gpus", "4"]
    capacity = 24e9
    for layout in read_plan(capsys, "vitl.json", *arguments)["layouts"]:
        micro, accumulation = layout["largest_micro_batch"], layout["its_accumulation"]
        assert micro * accumulation * 4 == 4096
        choice = [f"zero_optimization.stage={layout['stage']}", f"cmae.model.remat={layout['remat']}"]
        for size, fits in ((micro, True), (2 * micro, False)):  # of 1024 images, the divisors are powers of 2
            if size <= 1024:
                changed = [*choice, f"train_micro_batch_size_per_gpu={size}"]
                again = read_plan(capsys, "vitl.json", *arguments, "--set", *changed)
                assert again["own"]["fits"] is fits
                own = next(
                    one
                    for one in again["layouts"]
                    if (one["stage"], one["remat"]) == (layout["stage"], layout["remat"])
                )
                assert (own["device_bytes"] <= capacity) is fits


def test_remat_and_stages_save_what_they_should(capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_plan(capsys, "vith.json", *IMAGENET, "--gpus", "32")
    taken = {(one["stage"], one["remat"]): one["device_bytes"] for one in plan["layouts"]}
    for stage in range(4):
        assert taken[stage, "full"] < taken[stage, "selective"] < taken[stage, "none"]
    assert taken[3, "none"] < taken[2, "none"] <= taken[1, "none"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train_batch_size=256", "train_micro_batch_size_per_gpu=32"], "gives InfoNCE 255 negatives"),
        (["cmae.schedule.duration=20ep"], "the peak learning rate is never reached"),
        (["cmae.target.momentum=0.9999", "cmae.schedule.duration=50ep"], ""),
        (["cmae.target.momentum=0.99999", "cmae.schedule.duration=50ep"], "for 1 / (1 - 0.99999) = 100000"),
        (["cmae.target.momentum=1.0"], "remembers forever"),
        (["train_micro_batch_size_per_gpu=2"], "BatchNorm sees 16 images at a time (2 x 8 ranks)"),
        (["cmae.checkpoint.every=400ep"], "only its end is saved"),
        (["cmae.schedule.base_lr=0.01"], "the peak learning rate 0.16 is outside of"),
        (["cmae.mask.ratio=0.95"], "leaves the encoder 8 of 196 patches"),
        (["zero_optimization.reduce_bucket_size=500000000"], "reduce_bucket_size=50000000"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_inconsistent_is_said_with_the_remedy(
    overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warnings = warnings_of(capsys, *overrides)
    assert len(warnings) == bool(told)
    assert told in "".join(warnings)


def test_a_run_that_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*IMAGENET, "--gpu", "3090", "--gpus", "8", "--set", "train_micro_batch_size_per_gpu=512"]
    page = run_plan(capsys, "vith.json", *arguments)
    assert "DOES NOT FIT" in page
    [remedy] = re.findall(r"warning: [\d.]+ GiB do not fit: write train_micro_batch_size_per_gpu=(\d+)", page)
    mended = [*arguments[:-1], f"train_micro_batch_size_per_gpu={remedy}"]
    assert "DOES NOT FIT" not in run_plan(capsys, "vith.json", *mended)


@pytest.mark.parametrize("written", ["1_281_167", "1,281,167", "1.281167M"])
def test_the_number_of_images_is_read_as_people_write_it(
    written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_plan(capsys, "vitb.json", "--images", written)["dataset_images"] == 1_281_167


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu", "H10"], "did you mean 'H100'?"),
        (["--images", "100"], "--images 100 is fewer than train_batch_size (4096)"),
        (["--images", "12 apples"], '"12 apples" is no count'),
        (["--gpus", "3", *IMAGENET], "3 ranks do not divide 4096"),
        (["--mfu", "1.5"], "--mfu 1.5: write a number above 0 and at most 1"),
        ([], "or give --images N"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # where no shards are
    assert main(["--deepspeed_config", str(REPOSITORY / "ds_configs" / "vits.json"), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_table_of_run_files_says_what_is_predicted() -> None:
    table = (REPOSITORY / "ds_configs" / "README.md").read_text()
    for config in CONFIGS:
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{config.name}`")]
        *_, between, fullest = [cell.strip() for cell in row.strip("|").split("|")]
        held, peaks = [], []
        for ranks in (1, 32):
            run = assume_precision(read_run(config), "bfloat16")
            batch = plan_batch(run.deepspeed, ranks=ranks)
            job = describe_job(run, batch=batch, ranks=ranks, device="cuda")
            idle = plan_moments(job)[0]
            held.append(f"{(idle.weights + idle.optimizer + idle.target) / 1e9:.2g}")
            peaks.append(f"{predict_peak(job).total_bytes / 1e9:.2g}")
        assert between == f"{held[0]} / {held[1]} GB"
        assert fullest == f"{peaks[0]} / {peaks[1]} GB"


def test_offloading_moves_bytes_to_main_memory(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*IMAGENET, "--gpus", "4", "--set", "zero_optimization.stage=2"]
    here = read_plan(capsys, "vith.json", *arguments)
    there = read_plan(
        capsys, "vith.json", *arguments, 'zero_optimization.offload_optimizer={"device": "cpu"}'
    )
    trained = here["parameters"]["trained"]
    for before, after in zip(here["layouts"], there["layouts"], strict=True):
        if before["stage"] == 0:  # has nothing to offload
            assert after == before
            continue
        assert before["host_bytes"] == 0
        assert after["tensor_bytes"]["optimizer"] == 0
        assert after["host_bytes"] >= before["tensor_bytes"]["optimizer"] == -(-trained // 4) * 12
        assert after["device_bytes"] < before["device_bytes"]


@pytest.mark.parametrize("accumulation", [1, 4, 64])
@pytest.mark.parametrize("prefetch", [1, 5])
def test_decoded_images_of_the_step_and_of_the_next_are_counted(
    accumulation: int, prefetch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    micro = 4096 // 8 // accumulation
    changed = [f"cmae.data.prefetch={prefetch}", f"train_micro_batch_size_per_gpu={micro}"]
    arguments = [*IMAGENET, "--gpus", "8", "--set", *changed, "cmae.views.target_crop=random"]
    loaded = read_plan(capsys, "vitb.json", *arguments, "cmae.views.master_px=256")["loaded_bytes"]
    one = micro * 2 * 3 * 256**2
    assert one < loaded / (2 * accumulation - 1 + prefetch) < 2 * one  # torch rounds up to a power of two
    assert f"{loaded / 2**30:.1f} GiB of main memory per rank for decoded images" in run_plan(
        capsys, "vitb.json", *arguments, "cmae.views.master_px=256"
    )
