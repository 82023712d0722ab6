"""The training loop, with DeepSpeed's engine, on a GPU and among ranks that are not there.

What is on the CPU where a GPU's tensor is due raises, in an operation or in a collective; work on two streams
that nothing orders raises; and the host waits in a steady step for nothing but what is listed here.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from cmae_scale.core.collectives import gather_objects
from tests.fakes.engine import fake_training
from tests.fakes.gpu import Wait

ZERO = "deepspeed/runtime/zero/"
# where DeepSpeed has the host wait in a steady step, and why that stays
DEEPSPEEDS = {
    "deepspeed/runtime/utils.py:is_invalid_grad_norm": "whether the update may go on: the one wait we need",
    "deepspeed/runtime/utils.py:mask_nan_or_inf_with_val_inplace": "a mark of a bad norm comes from the CPU",
    f"{ZERO}stage_1_and_2.py:has_overflow": "fp16 and bf16: the host decides on the update",
    f"{ZERO}stage_1_and_2.py:_check_overflow": "the same",
    f"{ZERO}stage_1_and_2.py:independent_gradient_partition_epilogue": "its reduction stream ends",
    f"{ZERO}stage3.py:independent_gradient_partition_epilogue": "the same",
    f"{ZERO}stage3.py:__reduce_and_partition_ipg_grads": "it holds no more than two buckets at a time",
    f"{ZERO}stage3.py:get_grad_norm_direct": "it makes a number on the CPU",
    f"{ZERO}partition_parameters.py:_allgather_params_coalesced": "what stays whole comes anew",
    f"{ZERO}stage3.py:_get_fp32_opt_state_partition": "each master; its reduction stream is idle then",
    f"{ZERO}stage3.py:has_overflow": "fp16 and bf16: the host decides on the update",
    f"{ZERO}partitioned_param_coordinator.py:_fetch_sub_module_impl": "it fetches only so far ahead",
    # bf16 without ZeRO looks at every gradient: a run file that minds writes stage 1
    "deepspeed/runtime/utils.py:has_overflow_serial": "one look for each gradient",
    "deepspeed/runtime/utils.py:has_overflow": "the same for all ranks",
    "deepspeed/runtime/utils.py:get_weight_norm": "its norm is made of numbers on the CPU",
}
OFFLOADED = {  # to the CPU and back is what was asked for
    f"{ZERO}stage_1_and_2.py",
    f"{ZERO}stage3.py",
    f"{ZERO}partition_parameters.py",
    f"{ZERO}partitioned_param_coordinator.py",
    "deepspeed/utils/tensor_fragment.py:get_full_hp_param",
    "cmae_scale/engine/ema.py:sync_",  # masters lie where the optimizer is
    "cmae_scale/engine/ema.py:_spread",  # at stages 1 and 2 a copy for each bucket
}
OURS = {
    "cmae_scale/engine/zero/patches.py:step"
}  # the norm of plain fp32 without ZeRO, which DeepSpeed never asks

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True}},
    "bf16 autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "fp16 autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "both": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}
CASES = [
    (stage, precision, offload)
    for stage in (0, 1, 2, 3)
    for precision in PRECISIONS
    for offload in OFFLOADS
    if stage or (offload == "none" and not precision.startswith("fp16"))  # refused, or torch's own scaler
    if stage == 3 or offload != "both"
]


@pytest.mark.slow_unless(stage=1, precision="bf16 autocast", offload="none")
@pytest.mark.slow_unless(stage=2, precision="bf16", offload="optimizer")
@pytest.mark.slow_unless(stage=3, precision="bf16", offload="optimizer")
@pytest.mark.parametrize(("stage", "precision", "offload"), CASES)
def test_every_tensor_is_in_its_place_and_the_host_waits_only_where_it_must(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    stage: int,
    precision: str,
    offload: str,
) -> None:
    """Two plain steps, one with a log line, and the encoder that is exported."""
    zero = {"stage": stage, **OFFLOADS[offload]}
    run = tiny_run(ranks=2, accumulation=2, cmae=MATH, zero_optimization=zero, **PRECISIONS[precision])

    def train() -> list[Wait]:
        with fake_training(run, log_every=4) as training:
            for _ in range(3):
                training.gpu.waits.clear()
                training.take()
            steady = list(training.gpu.waits)
            training.take()
            training.task.gather_encoder()
            return steady

    [waits] = on_ranks(train, ranks=1)
    known = {*DEEPSPEEDS, *OURS, *(OFFLOADED if offload != "none" else ())}
    unknown = [wait for wait in waits if not {wait.place, wait.place.partition(":")[0]} & known]
    assert not unknown, Counter(unknown)
    assert any("norm" in wait.place or wait.place in OURS for wait in waits), "an update without a look at it"


# the other kernels, and what is compiled or recorded, are a GPU's own
MATH = {
    "model": {"attention": "math"},
    "compile": "none",
    "cuda_graphs": "off",
    "fused_views": "off",
}


def test_it_sees_the_waits_that_torch_saw_on_a_gpu(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], repository: Path
) -> None:
    """Those that torch warns of: that somebody asks to wait for streams or events, it leaves to them."""
    record = json.loads((repository / "tests/bench/records/gpu.json").read_text())
    if record["versions"]["deepspeed"] != deepspeed.__version__:
        pytest.skip("the record is of another DeepSpeed")
    seen = record["results"]["waits"]["a step"]
    run = tiny_run(
        ranks=2,
        accumulation=2,
        cmae=MATH,
        zero_optimization={"stage": 1, "overlap_comm": True},
        **PRECISIONS["bf16 autocast"],
    )

    def train() -> list[Wait]:
        with fake_training(run) as training:
            for _ in range(4):
                training.gpu.waits.clear()
                training.take()
            return training.gpu.waits

    [waits] = on_ranks(train, ranks=1)
    asked = [wait.place for wait in waits if wait.what not in ("synchronize", "event")]
    assert len(asked) == seen["waits"]
    assert set(asked) == {name_function(place) for place in seen["places"]}


def name_function(place: str) -> str:
    """ "deepspeed/runtime/utils.py:233" by the function that has the line."""
    path, _, line = place.rpartition(":")
    tree = ast.parse((Path(deepspeed.__file__).parent.parent / path).read_text())
    [name] = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.lineno <= int(line) <= (node.end_lineno or 0)
    ]
    return f"{path}:{name}"


@pytest.mark.slow_unless(stage=3)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_is_left_out_is_explained_and_undone_on_the_gpu(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], stage: int
) -> None:
    run = tiny_run(ranks=2, stage=stage, accumulation=2, cmae=MATH)

    def train() -> tuple[str, set[str]]:
        with fake_training(run) as training:
            training.take()
            training.gpu.flags = True  # also of the norm: it is not finite
            training.gpu.waits.clear()
            training.take()
            bad = training.trainer._guard.bad
            training.gpu.flags = False
            training.take()
            places = {wait.place for wait in training.gpu.waits}
            return bad.cause, {place for place in places if place.startswith("cmae_scale/")}

    [(cause, places)] = on_ranks(train, ranks=1)
    assert cause in ("loss jumped", "gradient is not finite")
    explained = "cmae_scale/engine/step_guard.py:_explain"
    assert explained in places
    assert places <= {explained, "cmae_scale/core/collectives.py:gather_objects"}


def read_a_value(module: Any, args: Any, output: Any) -> None:
    output.pixels.sum().item()


def choose_by_values(module: Any, args: Any, output: Any) -> None:
    output.pixels[output.pixels > 0].sum()


def mix_devices(module: Any, args: Any, output: Any) -> None:
    output.pixels + torch.zeros(output.pixels.shape)


def index_from_the_cpu(module: Any, args: Any, output: Any) -> None:
    output.pixels[torch.arange(2)]


def send_from_the_cpu(module: Any, args: Any, output: Any) -> None:
    torch.distributed.all_reduce(torch.zeros(3))


def gather_objects_(module: Any, args: Any, output: Any) -> None:
    gather_objects("something")


def compute_beside(module: Any, args: Any, output: Any) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        output.pixels.square()


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (read_a_value, "_local_scalar_dense .*:read_a_value"),
        (choose_by_values, "boolean index .*:choose_by_values"),
        (mix_devices, "same device"),
        (index_from_the_cpu, "index from the CPU .*:index_from_the_cpu"),
        (send_from_the_cpu, "WrongDeviceError: allreduce by NCCL got a tensor on the cpu"),
        (gather_objects_, "all_gather_object .*:gather_objects"),
        (compute_beside, "RaceError: "),
    ],
)
def test_planted_faults_are_found(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    plant: Callable[[Any, Any, Any], None],
    found: str,
) -> None:
    run = tiny_run(ranks=2, stage=1, cmae=MATH)

    def train() -> str:
        with fake_training(run) as training:
            training.take()
            training.gpu.waits.clear()
            training.state.engine.module.register_forward_hook(plant)
            try:
                training.take()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "\n".join(
                f"{what} {place}" for what, place in training.gpu.waits if place not in DEEPSPEEDS
            )

    [told] = on_ranks(train, ranks=1)
    assert re.search(found, told), told
