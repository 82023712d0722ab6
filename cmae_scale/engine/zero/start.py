"""The model of a run and its DeepSpeed engine: split over ranks, compiled, with its parameter groups."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from timm.models.vision_transformer import Block
from torch import nn

from cmae_scale.checkpoints.commit import has_begun
from cmae_scale.config.cmae import Remat
from cmae_scale.config.run_file import Run
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.zero.checks import check_memory_plan
from cmae_scale.engine.zero.partitions import drop_node_copies_, partition_of
from cmae_scale.engine.zero.patches import mend_engine_, without_monitors
from cmae_scale.engine.zero.remat import adapt_settings, choose_block_runner
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.models.initial import start_from_


def build_model(run: Run, *, device: torch.device) -> tuple[CMAE, list[str]]:
    """The model of a run as it starts, and where its weights are from; under ZeRO-3 already split over ranks.

    `run` is resolved and the process group is up. The weights are drawn on the CPU and equal those of a
    model built whole, to the bit, whatever the device. One that starts from a file is built whole; a run that
    has begun already has no need of the file.
    """
    init = None if gather_objects(has_begun(run))[0] else run.cmae.model.init
    if init is not None or run.deepspeed.get("zero_optimization", {}).get("stage", 0) != 3:
        whole = build_cmae(run.cmae)
        return whole, [] if init is None else start_from_(whole, run.cmae, path=Path(init))
    settings = adapt_settings(run.cmae.model.remat, settings=run.deepspeed)
    check_settings(settings, run)
    check_memory_plan(settings, device=device.type, has_target=run.cmae.has_contrast)
    model = build_cmae(run.cmae, on_init=Splitter(settings).split_)
    with torch.no_grad():
        for pair in model.target_pairs():
            partition_of(pair.target).copy_(partition_of(pair.online))
    drop_node_copies_(pair.target for pair in model.target_pairs())
    for buffer in model.buffers():  # DeepSpeed moves nothing of a model that comes in shards
        buffer.data = buffer.data.to(device)
    return model, []


class Splitter:
    """Splits module after module, as DeepSpeed splits a whole model at `deepspeed.initialize`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._first: Any = None  # any split parameter: it knows how to split others

    def split_(self, module: nn.Module) -> None:
        """Keep this rank's shard of the parameters that `module` itself holds. All ranks call it together."""
        own = list(module.parameters(recurse=False))
        if not own:
            return
        for parameter in own:
            parameter.data = parameter.data.to(self._dtype())
        if self._first is None:
            deepspeed.zero.Init(module=nn.ParameterList(own), config_dict_or_path=self._settings)
            self._first = own[0]
        else:
            self._first.convert_to_zero_parameters(param_list=own)

    def _dtype(self) -> torch.dtype:
        if self._settings.get("bf16", {}).get("enabled", False):
            return torch.bfloat16
        return torch.float16 if self._settings.get("fp16", {}).get("enabled", False) else torch.float32


_NO_DECAY_LEAVES = frozenset({"bias", "pos_embed"})
_TOKENS = frozenset({"cls_token", "mask_token"})


def weight_decay_groups(
    model: nn.Module, *, weight_decay: float, decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with `weight_decay` and without.

    Without are biases, LayerNorm, positions and, unless `decay_tokens`, class and mask tokens. The heads'
    BatchNorm gain decays. Source: official CMAE config (names containing ln, bias, pos_embed, mask_token,
    cls_token): of CMAE-B 120 916 992 parameters decay and 201 216 do not. With `decay_tokens` a model without
    heads is split as MAE's: there exactly what has one dimension does not decay.
    """
    spared = _NO_DECAY_LEAVES if decay_tokens else _NO_DECAY_LEAVES | _TOKENS
    exempt = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in spared
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_lars(groups: list[dict[str, Any]], *, settings: dict[str, Any]) -> Any:
    """timm's LARS for a run file whose optimizer has that type; DeepSpeed has none of its own.

    Its step depends on the norm of each whole parameter, so ConfigError where DeepSpeed cuts them into flat
    partitions: above ZeRO stage 0, and in a bf16 or fp16 engine.
    """
    from timm.optim import Lars

    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage or any(settings.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        raise ConfigError(
            'optimizer.type "LARS" needs whole fp32 parameters: write zero_optimization.stage=0 (heads are '
            'small) and torch_autocast, or "SGD"'
        )
    params = dict(settings["optimizer"].get("params", {}))
    try:
        return Lars(groups, **params)
    except TypeError as error:
        raise ConfigError(f"optimizer.params: timm's LARS refuses them: {error}") from None


Engine = Any  # deepspeed.DeepSpeedEngine, which ships no types

# what DeepSpeed calls the sections of a ds_config in its own complaints
_SECTIONS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "TensorBoardConfig": "tensorboard",
    "WandbConfig": "wandb",
    "CSVConfig": "csv_monitor",
}


def start_engine(model: nn.Module, run: Run, *, groups: list[dict[str, Any]] | None = None) -> Engine:
    """The DeepSpeed engine for `model` as the run file says.

    Without `groups`, the model is pre-training's: weight decay where the method has it, blocks run as its
    settings say. `run` is resolved (no "auto" left). Raises ConfigError for what DeepSpeed refuses.
    """
    settings, optimizer = run.deepspeed, None
    if groups is None:
        settings = adapt_settings(run.cmae.model.remat, settings=run.deepspeed)
        decay = settings.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
        groups = weight_decay_groups(model, weight_decay=decay, decay_tokens=run.cmae.decay_tokens)
        if run.cmae.compile == "blocks":
            compile_blocks_(model, remat=run.cmae.model.remat, settings=settings)
        if settings.get("zero_optimization", {}).get("stage", 0) == 3:
            # hooks of a block, not of each of its layers: less than half of the host's time, the same bits
            set_z3_leaf_modules(model, [Block])
        model.set_remat_(choose_block_runner(run.cmae.model.remat, settings=settings))  # type: ignore[operator]
    elif "activation_checkpointing" in settings:
        raise ConfigError(
            f"{run.path}: write transfer.encoder.remat=full instead of activation_checkpointing"
        )
    if str(settings.get("optimizer", {}).get("type", "")).lower() == "lars":
        optimizer = build_lars(groups, settings=settings)
        settings = {name: value for name, value in settings.items() if name != "optimizer"}
    check_settings(settings, run)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=optimizer,
            config=without_monitors(settings),
        )
    except (TypeError, ValueError, AttributeError, AssertionError, ValidationError) as error:
        raise ConfigError(f"{run.path}: DeepSpeed refuses these settings: {_first_line(error)}") from error
    mend_engine_(engine)
    return engine


def check_settings(settings: dict[str, Any], run: Run) -> None:
    """Let DeepSpeed read the config before anything is built, and say its complaint in one sentence."""
    try:
        DeepSpeedConfig(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join([_SECTIONS.get(error.title, error.title), *(str(part) for part in first["loc"])])
        raise ConfigError(f"{run.path}: DeepSpeed refuses {key}: {first['msg']}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AssertionError,
        deepspeed.runtime.config.DeepSpeedConfigError,
    ) as error:
        raise ConfigError(f"{run.path}: DeepSpeed refuses these settings: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# All blocks are one function to torch, compiled anew for every kind: encoder's, each decoder's first, last
# and others, the target's last, with and without gradient. Above the limit torch runs the rest uncompiled.
BLOCK_KINDS = 32


def compile_blocks_(model: nn.Module, *, remat: Remat, settings: dict[str, Any]) -> None:
    """Have torch compile every block of `model` at its first call; before `deepspeed.initialize`.

    Block by block, because whole models break at DeepSpeed's hooks; all blocks of a width share what was
    compiled. Losses are those of uncompiled blocks (CPU, ZeRO 0 to 2, every checkpointing but "selective").
    Raises ConfigError where compiling makes no sense: at stage 3 the losses are right too, but every Linear
    has a hook that breaks its block's graph, one partition per hook, until torch gives up compiling.
    """
    if settings.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ConfigError(
            'cmae.compile "blocks" gains nothing at ZeRO stage 3: hooks that gather weights cut each block '
            "into partitions: write zero_optimization.stage=2 or cmae.compile=none"
        )
    if remat == "selective":
        raise ConfigError(
            'cmae.compile "blocks" hides the matrix products that cmae.model.remat "selective" would keep: '
            'write "full" or "none"'
        )
    config = torch._dynamo.config  # the only way to the limit
    config.recompile_limit = max(config.recompile_limit, BLOCK_KINDS)
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
