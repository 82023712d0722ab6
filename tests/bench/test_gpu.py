"""bench gpu, rehearsed on the CPU."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmae_scale.bench import main
from cmae_scale.benchmarks.gpu import PARTS, _next_answer


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["gpu", "--record", str(tmp_path / "gpu.json")]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_part_that_hangs_or_dies_is_given_up() -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=sys.exit, args=(3,))
    process.start()
    process.join()
    with pytest.raises(TimeoutError, match="stopped"):
        _next_answer(context.Queue(), process, until_s=0.0)
    with pytest.raises(TimeoutError, match="ended with status 3"):
        _next_answer(context.Queue(), process, until_s=float("inf"))


@pytest.mark.slow
def test_its_rehearsal_records_every_part_and_measures_nothing_twice(
    tmp_path: Path, repository: Path
) -> None:
    shards, record = tmp_path / "digits", tmp_path / "gpu.json"
    make = [sys.executable, "data_prep/make_shards.py", "--source", "digits", "--out", str(shards)]
    measure = [sys.executable, "-m", "cmae_scale.bench", "gpu", "--quick", "--device", "cpu"]
    measure += ["--record", str(record), "--shards", str(shards / "train")]
    subprocess.run(make, cwd=repository, check=True, capture_output=True)
    subprocess.run(measure, cwd=repository, check=True, capture_output=True)
    results = json.loads(record.read_text())["results"]
    assert set(results) == set(PARTS)
    for part, figures in results.items():
        assert figures, part
        assert not any("failed" in one for one in figures.values()), figures
    assert results["trace"]["fp32"]["last_error"] == results["agreement"]["fp32"]["loss_error"] == 0
    assert all(one.get("are_weights_equal", True) for one in results["repetition"].values())
    again = subprocess.run(measure, cwd=repository, check=True, capture_output=True, text=True)
    assert again.stdout.splitlines() == [f"record {record}"]
