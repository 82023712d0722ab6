"""The DeepSpeed engine of a run, as its file says."""

from typing import Any

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn

from cmae_scale.config.run_file import Run
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.compiled import compile_blocks_
from cmae_scale.engine.metrics.writers import without_monitors
from cmae_scale.engine.optim import build_lars, weight_decay_groups
from cmae_scale.engine.remat import adapt_settings, choose_block_runner
from cmae_scale.engine.zero.patches import mend_engine_

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
        place = ".".join([_SECTIONS.get(error.title, error.title), *(str(part) for part in first["loc"])])
        raise ConfigError(f"{run.path}: DeepSpeed refuses {place}: {first['msg']}") from None
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
