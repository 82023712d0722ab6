"""What we use of DeepSpeed beyond its documentation: an upgrade that takes it away fails here, by name."""

import ast
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# name -> what for. All of them are touched in engine/zero/ alone
MODULES = {
    "deepspeed.runtime.config.DeepSpeedConfig": "reads a ds_config before anything is built",
    "deepspeed.runtime.config.DeepSpeedConfigError": "its complaint",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": "the loss scale of fp16 autocast under ZeRO",
    "deepspeed.monitor.config.get_monitor_config": "monitors apart from the engine",
    "deepspeed.monitor.monitor.MonitorMaster": "monitors apart from the engine",
    "deepspeed.utils.safe_get_full_fp32_param": "fp32 weights at stages 0 to 2",
    "deepspeed.utils.safe_get_local_grad": "gradients at stage 3",
    "deepspeed.ops.__compatible_ops__": "an op that is not to be compiled",
}
ENGINE = {
    "_global_grad_norm": "the norm of a step that is checked here, or left out",
    "basic_optimizer": "torch's optimizer, whose state is saved",
    "torch_autocast_z0_gradscaler": "fp16 autocast at stage 0",
    "buffered_allreduce_fallback": "not for a lone rank",
    "clip_fp32_gradients": "where the norm is known already",
    "micro_steps": "where accumulation stands, when a run goes on",
}
OPTIMIZER = {  # by ZeRO stage and section, as "3 fp32"
    "0 fp32": {"state": "nothing but torch's optimizer"},
    "0 bf16": {
        "optimizer": "the one inside, whose rehearsal is forgotten",
        "fp32_groups": "masters",
        "fp16_groups": "what the masters are rounded to",
    },
    "1 fp32": {"overflow": "whether an update was left out", "single_partition_of_fp32_groups": "masters"},
    "2 bf16": {
        "overflow": "whether an update was left out",
        "check_grad_overflow": "that NaN is looked for",
        "update_lp_params": "weights anew from their masters",
    },
    "3 fp32": {
        "persistent_parameters": "small parameters that every rank keeps whole",
        "fp32_partitioned_groups_flat": "masters",
        "fp16_partitioned_groups_flat": "what the masters are rounded to",
        "fp16_partitioned_groups": "partitions of the parameters",
        "grad_position": "where a parameter lies in its group",
        "get_param_id": "where a parameter lies in its group",
        "unflatten": "a flat group as partitions",
        "checkpoint_event_epilogue": "weights anew after loading",
        "_get_fp32_opt_state_partition": "a master where the optimizer keeps it",
        "_swappable_optimizer_subgroup": "whether it is on NVMe",
        "_release_swap_buffers": "then its buffer is given back",
    },
}
PARAMETER = {
    "1 fp32": {
        "_hp_mapping": "where the master of a parameter lies",
        "_index_in_param_group": "its gradient",
    },
    "3 fp32": {
        "ds_tensor": "this rank's partition",
        "ds_numel": "elements of the whole",
        "ds_shape": "shape of the whole",
        "ds_id": "its gradient",
        "ds_persist": "whether every rank keeps it whole",
        "ds_zero_partition_rank": "which partition is this rank's",
        "_z3_optimizer": "its optimizer",
        "partition": "splits it again",
        "all_gather": "makes it whole",
        "convert_to_zero_parameters": "splits others as it was",
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_still_has_it(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{name}: {MODULES[name]}"


@pytest.mark.dist
@pytest.mark.parametrize("kind", OPTIMIZER)
def test_an_engine_still_has_it(
    kind: str, on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    stage, section = kind.split()

    def missing() -> list[str]:
        from cmae_scale.engine.process.group import start_processes
        from cmae_scale.engine.setup import start_pretraining

        formats = {} if section == "fp32" else {section: {"enabled": True}}
        run = tiny_run(ranks=1, stage=int(stage), cmae={"out": str(tmp_path / "run")}, **formats)
        engine = start_pretraining(run, context=start_processes(), data_order="none").engine
        trained = next(engine.module.online_encoder.parameters())
        wanted = ((engine, ENGINE), (engine.optimizer, OPTIMIZER[kind]), (trained, PARAMETER.get(kind, {})))
        return [name for owner, names in wanted for name in names if not hasattr(owner, name)]

    assert on_ranks(missing, ranks=1) == [[]]


def list_names(path: Path) -> Iterator[str]:
    """Attributes, imported modules and names given to getattr in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name):
                yield name
            case ast.ImportFrom(module=str(module)):
                yield module
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                yield name


PRIVATE = {
    *ENGINE,
    *(name for names in (*OPTIMIZER.values(), *PARAMETER.values()) for name in names),
} - {"state", "optimizer", "partition", "all_gather"}  # common words, of other things too


def test_nothing_private_is_touched_outside_of_one_folder(repository: Path) -> None:
    package = repository / "cmae_scale"
    for path in package.rglob("*.py"):
        if (package / "engine" / "zero") in path.parents:
            continue
        touched = set(list_names(path))
        assert not touched & PRIVATE, f"{path}: {touched & PRIVATE}"
        modules = {name for name in touched if name.startswith("deepspeed.")}
        assert modules <= {"deepspeed.accelerator"}, f"{path}: {modules}"
