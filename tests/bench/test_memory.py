"""What training takes of this machine's memory, as its kernel counts it, beside the prediction."""

from pathlib import Path

import pytest

from cmae_scale.benchmarks.peak_memory import measure_footprint
from cmae_scale.config.batches import plan_batch
from cmae_scale.config.run_file import read_run, resolve_run
from cmae_scale.planning.forecast import describe_job
from cmae_scale.sizing.memory import predict_peak

# on a CPU without it, a larger image would take minutes in bf16
BF16 = [
    "torch_autocast.enabled=true",
    "torch_autocast.dtype=bfloat16",
    "cmae.model.attention=explicit",
    "cmae.views.img_px=64",
    "cmae.views.master_px=64",
    "cmae.views.shift_px=1",
]


@pytest.mark.slow
@pytest.mark.bench
@pytest.mark.parametrize(
    "changes",
    [
        ["torch_autocast.enabled=false", "cmae.model.attention=flash", "zero_optimization.stage=0"],
        ["cmae.model.remat=full", "zero_optimization.stage=2", *BF16],
    ],
    ids=["fp32", "autocast, remat full"],
)
def test_resident_memory_is_within_a_tenth_of_the_prediction(
    changes: list[str], repository: Path, tmp_path: Path
) -> None:
    sizes = ["train_batch_size=4", "train_micro_batch_size_per_gpu=4", f"cmae.out={tmp_path}/run"]
    run = read_run(repository / "ds_configs" / "vits.json", [*sizes, *changes])
    [measured] = measure_footprint(run, ranks=1, steps=2)
    batch = plan_batch(run.deepspeed, ranks=1)
    run = resolve_run(run, batch=batch, total_steps=2, warmup_steps=0)  # on one rank without ZeRO
    job = describe_job(run, batch=batch, ranks=1, device="cpu")
    assert predict_peak(job).total_bytes == pytest.approx(measured.grown_bytes, rel=0.10)
