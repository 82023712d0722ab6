"""What a pre-training run has when its first step begins: precision, model, engine, and a description."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cmae_scale.config.batches import MICRO
from cmae_scale.config.cmae import DecoderConfig
from cmae_scale.config.run_file import Run
from cmae_scale.config.schedules import Timetable
from cmae_scale.config.sizes import count_prefix, read_size
from cmae_scale.core.collectives import gather_objects
from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.checkpoint.metadata import DataOrder, build_metadata
from cmae_scale.engine.cuda_graphs import record_networks_
from cmae_scale.engine.metrics.health import Health
from cmae_scale.engine.precision import Product, read_precision, settle_arithmetic
from cmae_scale.engine.process.group import RankContext
from cmae_scale.engine.train_state import TrainState, count_trainable, name_precision, start_train_state
from cmae_scale.engine.zero.start import build_model
from cmae_scale.layers.attention import AttentionShape, describe_attention, set_attention_
from cmae_scale.sizing.flops import count_kept


def start_pretraining(run: Run, *, context: RankContext, data_order: DataOrder) -> TrainState:
    """The state of a pre-training run; `data_order` tells the samples that a state belongs to."""
    if run.cmae.deterministic:
        be_deterministic()
    run, attention, record, notices = settle_arithmetic(
        run,
        device=context.device,
        product=find_product(run),
        attention=run.cmae.model.attention,
        shapes=list_attention(run),
    )
    are_graphs_asked_for = run.cmae.cuda_graphs == "on"
    run, told = settle_speed(run, device=context.device)
    notices = [*notices, *told]
    model, origin = build_model(run, device=context.device)
    for part, choice in attention.items():
        set_attention_(model.get_submodule(part), choice)
    state = start_train_state(
        run,
        context=context,
        model=model,
        pairs=model.target_pairs(),
        attention=attention,
        metadata=build_metadata(
            run,
            kind=describe_kind(run, data_order=data_order),
            ranks=context.world.size,
            precision=name_precision(read_precision(run.deepspeed)),
            attention=record,
        ),
        notices=[*notices, *origin],
    )
    if run.cmae.cuda_graphs == "on":
        with state.use_attention(), _autocast_without_cache(run, device=context.device):
            failed = record_networks_(
                model,
                images=run.deepspeed[MICRO],
                img_px=run.cmae.views.img_px,
                device=context.device,
                accumulates=int(run.deepspeed["gradient_accumulation_steps"]) > 1,
            )
        if failed is not None and are_graphs_asked_for:
            raise ConfigError(f'cmae.cuda_graphs "on": recording failed ({failed}): write "off"')
        if failed is not None:
            state.notices.append(f"warning: no CUDA graphs, for recording failed ({failed}): slower steps")
    if model.target_encoder is not None and model.target_projector is not None:
        state.timer.watch_(model.target_encoder, model.target_projector, name="target")
    return state


def be_deterministic() -> None:
    """Hold this process to algorithms that repeat their bits; before its first matrix product on a GPU.

    An operation that has none raises RuntimeError with its name.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # Source: cuBLAS, results reproducibility
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # nothing here reads what it has not written


def settle_speed(run: Run, *, device: torch.device) -> tuple[Run, list[str]]:
    """The run with "auto" of compile, cuda_graphs and fused_views decided, and what its user should know.

    All ranks together. Raises ConfigError for graphs or kernels that are asked for and cannot be.
    """
    cfg, stage = run.cmae, run.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if cfg.cuda_graphs == "on" and device.type != "cuda":
        raise ConfigError(f'cmae.cuda_graphs "on" needs a GPU, and this is a {device.type}: write "auto"')
    if cfg.cuda_graphs == "on" and stage == 3:
        raise ConfigError(
            'cmae.cuda_graphs "on" cannot be at ZeRO stage 3, which gathers weights anew in every step: '
            'write zero_optimization.stage=2 or "auto"'
        )
    if cfg.fused_views == "on" and device.type != "cuda":
        raise ConfigError(f'cmae.fused_views "on" needs a GPU, and this is a {device.type}: write "auto"')
    is_gpu = device.type == "cuda"
    compiles = is_gpu and stage < 3 and cfg.model.remat != "selective" and not cfg.deterministic
    wanted = [compiles and cfg.compile == "auto", is_gpu and cfg.fused_views == "auto"]
    failures = [text for text in gather_objects(try_to_compile(device) if any(wanted) else None) if text]
    settled: dict[str, Any] = {}
    if cfg.cuda_graphs == "auto":
        # DeepSpeed's own checkpointing reads the random state, which no recording allows
        records = is_gpu and stage < 3 and "activation_checkpointing" not in run.deepspeed
        settled["cuda_graphs"] = "on" if records else "off"
    if cfg.compile == "auto":
        settled["compile"] = "blocks" if wanted[0] and not failures else "none"
    if cfg.fused_views == "auto":
        settled["fused_views"] = "on" if wanted[1] and not failures else "off"
    told = [f"nothing is compiled, for torch cannot compile here ({failures[0]})"] if failures else []
    return replace(run, settings=cfg.model_copy(update=settled)), told


def try_to_compile(device: torch.device) -> str | None:
    """Why torch cannot compile for `device`: no C compiler, no headers of Python's; None where it can."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # whatever a toolchain may do
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _autocast_without_cache(run: Run, *, device: torch.device) -> Any:
    precision = read_precision(run.deepspeed)
    is_on = precision.compute is not precision.parameters
    return torch.autocast(
        device.type, dtype=precision.compute if is_on else None, enabled=is_on, cache_enabled=False
    )


def watch_health(state: TrainState) -> Health | None:
    """Signs of learning and of collapse in a pre-training run; None where the run file wants none."""
    cfg, model = state.run.cmae, state.engine.module
    if not cfg.monitor.health:
        return None
    modules = {
        "encoder": [model.online_encoder],
        "pixel_decoder": [model.pixel_decoder],
        "feature_decoder": [model.feature_decoder],
        "heads": [model.projector, model.predictor],
    }
    parts = {
        name: [p for module in group if module is not None for p in module.parameters()]
        for name, group in modules.items()
    }
    has_chance = cfg.has_contrast and cfg.loss.contrast == "infonce"
    chance = math.log(state.run.deepspeed["train_batch_size"]) if has_chance else None
    distance = state.ema.measure_distance if state.ema.target else None
    return Health(parts, distance=distance, chance=chance)


def describe_kind(run: Run, *, data_order: DataOrder) -> dict[str, Any]:
    """What a pre-training run cannot change on the way without being another: samples, model and method."""
    sections = json.loads(
        run.cmae.model_dump_json(include={"model", "mask", "heads", "views", "loss", "target"})
    )
    # change speed, memory, rounding or the beginning, not the model
    for free in ("attention", "remat", "skip_redundant", "init"):
        del sections["model"][free]
    return {
        "train_batch_size": run.deepspeed["train_batch_size"],
        "seed": run.cmae.seed,
        "data": data_order,
        **sections,
    }


def find_product(run: Run) -> Product:
    """The first linear layer of the encoder's MLP on a micro-batch."""
    model, [shape, *_] = run.cmae.model, list_attention(run).values()
    width = read_size(model).embed_dim
    return Product(shape.images * shape.tokens, width, int(width * model.mlp_ratio))


def list_attention(run: Run) -> dict[str, AttentionShape]:
    """What attention works on in each part of the model, by the part's name in it."""
    cfg, images = run.cmae, run.deepspeed[MICRO]
    size, prefix = read_size(cfg.model), count_prefix(cfg.model)
    grid = cfg.views.img_px // cfg.model.patch_size
    kept = partial(count_kept, grid, cell=cfg.mask.cell)

    def shape(decoder: DecoderConfig) -> AttentionShape:
        return AttentionShape(
            decoder.num_heads, decoder.embed_dim // decoder.num_heads, grid**2 + prefix, images
        )

    heads, head_dim = size.num_heads, size.embed_dim // size.num_heads
    shapes = {
        "online_encoder": AttentionShape(heads, head_dim, kept(ratio=cfg.mask.ratio) + prefix, images),
        "pixel_decoder": shape(cfg.model.pixel_decoder),
    }
    if cfg.has_contrast:
        seen = kept(ratio=cfg.target.mask_ratio) + prefix
        shapes["target_encoder"] = AttentionShape(heads, head_dim, seen, images, is_trained=False)
        feature = cfg.model.feature_decoder
        if feature.depth and not feature.shared:
            shapes["feature_decoder"] = shape(feature)
    return shapes


def describe(state: TrainState, *, images: int, times: Timetable) -> str:
    """What runs, in a few lines."""
    cfg, model = state.run.cmae, state.engine.module
    kind = "hybrid ViT" if cfg.model.is_hybrid else "ViT"
    name = cfg.model.encoder or f"{kind} {cfg.model.embed_dim} wide, {cfg.model.depth} deep"
    method = "CMAE" if cfg.has_contrast else "MAE"
    device = state.context.device
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    batch_samples = state.run.deepspeed["train_batch_size"]
    lines = [
        f"{method} {name}: {count_trainable(model) / 1e6:.1f} M trainable parameters",
        f"{images:,} images, {times.total_steps} steps of {batch_samples}, {times.steps_per_epoch} an epoch",
        f"{state.context.world.size} x {device.type} ({hardware}), ZeRO {state.metadata.zero_stage}, "
        f"{state.metadata.precision}, remat {cfg.model.remat}",
        f"attention {describe_attention(state.attention)}",
        f"run folder {state.run.out}" + (f", resumed at step {state.first_step}" if state.first_step else ""),
    ]
    return "\n".join([*lines, *state.notices])
