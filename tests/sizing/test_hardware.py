from pathlib import Path

import pytest

from cmae_scale.core.errors import ConfigError
from cmae_scale.sizing.hardware import GPUS, Gpu, find_gpu, find_local_gpus, recognise_gpu


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("H100", "H100"),
        ("h200", "H200"),
        ("nvidia a100", "A100"),
        ("A100-80GB", "A100"),
        ("a100 40gb", "A100-40GB"),
        ("rtx 4090", "RTX-4090"),
        ("GeForce RTX 3090", "RTX-3090"),
        ("A6000", "RTX-A6000"),
        ("v100_32gb", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_a_gpu_is_found_however_it_is_spelled(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@pytest.mark.parametrize(("asked", "meant"), [("H10", "H100"), ("a10040", "A100-40GB"), ("l40", "L40S")])
def test_a_typo_is_told_the_nearest_one(asked: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        find_gpu(asked)


@pytest.mark.parametrize(
    ("says", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI250X / MI250", "MI250"),
    ],
)
def test_a_device_is_recognised_by_what_it_calls_itself(says: str, name: str) -> None:
    gpu = recognise_gpu(says)
    assert gpu is not None
    assert gpu.name == name


@pytest.mark.parametrize(
    "says", ["NVIDIA A10G", "NVIDIA T400", "NVIDIA L40", "NVIDIA GH200 480GB", "AMD Instinct MI300A", "Intel"]
)
def test_others_are_not_taken_for_it(says: str) -> None:
    assert recognise_gpu(says) is None


def test_those_before_ampere_have_no_bf16() -> None:
    assert {gpu.name for gpu in GPUS if gpu.half == "float16"} == {"V100", "V100-32GB", "T4"}


def test_every_listed_gpu_is_found_by_its_name() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


def test_the_gpus_of_this_machine_are_what_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_local_gpus() is None
    driver.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    driver.chmod(0o755)
    found = find_local_gpus()
    assert found is not None
    assert (found.gpu.name, found.number, found.gpu.flops) == ("H100", 2, 989e12)
    assert found.gpu.memory_gib == pytest.approx(81559 / 1024)
    driver.write_text("#!/bin/sh\necho 'NVIDIA A10G, 23028'\n")
    unknown = find_local_gpus()
    assert unknown is not None
    assert unknown == (Gpu("NVIDIA A10G", None, 23028 / 1024), 1)
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert find_local_gpus() is None
