"""A run that is under way: model, engine, target average and training states kept in step with each other."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmae_scale.core.config import Run, dump_run
from cmae_scale.core.durations import Timetable
from cmae_scale.core.errors import ConfigError
from cmae_scale.core.files import write_text
from cmae_scale.core.settings import CmaeConfig
from cmae_scale.engine.checkpoint import load_newest, save_state
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.monitors import settle_monitors
from cmae_scale.engine.stamp import Stamp, build_stamp
from cmae_scale.engine.start import Engine, Place, Precision, read_precision, start_engine
from cmae_scale.engine.weights import gather_weights
from cmae_scale.layers.attention import AttentionChoice, choose_attention, set_attention_, use_attention
from cmae_scale.models import build_cmae
from cmae_scale.models.card import CARD_FILE, Library, build_card, describe_run, write_card
from cmae_scale.models.initial import start_from_
from cmae_scale.models.sizes import read_size
from cmae_scale.models.weights import export_encoder


@dataclass
class Session:
    """`first_step` optimizer steps were done when it started. Methods are called by all ranks together."""

    run: Run
    place: Place
    engine: Engine
    ema: TargetEma
    attention: AttentionChoice
    stamp: Stamp
    first_step: int
    notices: list[str] = field(default_factory=list)  # what the user should know

    def use_attention(self) -> AbstractContextManager[None]:
        """Hold forward and backward passes to the attention kernel of the run file."""
        return use_attention(self.attention)

    def update_target_(self, momentum: float) -> None:
        """Let the target follow, if the optimizer did move the weights (fp16 skips a step that overflows)."""
        if self.engine.was_step_applied():
            self.ema.update_(momentum)

    def save(self, step: int) -> str | None:
        """Commit the state after `step` steps. None, or what went wrong: older states are untouched then."""
        return save_state(
            self.engine,
            self.run.out / "checkpoints",
            step=step,
            stamp=self.stamp,
            target_masters=self.ema.state(),
            keep=self.run.cmae.checkpoint.keep,
            world=self.place.world,
        )

    def export(self, metrics: Mapping[str, Any]) -> Path:
        """Write the online encoder to RUN/encoder: see `export_encoder`. Its card tells the `metrics`."""
        folder = self.run.out / "encoder"
        weights = gather_weights(self.engine.module.online_encoder)
        if self.place.world.is_first:
            model = self.run.cmae.model
            export_encoder(weights, folder, model=model, views=self.run.cmae.views)
            if metrics or not (folder / CARD_FILE).exists():
                facts = describe_run(self.run, metrics=metrics)
                library: Library = "cmae-scale" if model.is_hybrid else "timm"
                write_card(folder, build_card(self.run.out.name, facts=facts, library=library))
        return folder


def start_session(run: Run, *, place: Place, data_order: str) -> Session:
    """Everything of the run on this rank, at the newest state in the run folder or at step 0.

    `run` is resolved; `data_order` names the sample order, which a state belongs to. Raises ConfigError when
    the run folder cannot be written, or holds states of another kind of run.
    """
    cfg, precision = run.cmae, read_precision(run.deepspeed)
    _open_folder(run, place)
    notices = settle_monitors(run.deepspeed)
    attention = choose_run_attention(cfg, device=place.device, dtype=precision.compute)
    model = build_cmae(cfg)
    if cfg.model.init is not None:
        notices += start_from_(model, cfg, path=Path(cfg.model.init))
    set_attention_(model, attention)
    engine = start_engine(model, run)
    session = Session(
        run=run,
        place=place,
        engine=engine,
        ema=TargetEma(model.target_pairs(), keep_master=precision.needs_master),
        attention=attention,
        stamp=build_stamp(run, ranks=place.world.size, precision=name_precision(precision), data=data_order),
        first_step=0,
        notices=notices,
    )
    if cfg.checkpoint.resume == "auto":
        folder = run.out / "checkpoints"
        loaded = load_newest(engine, folder, stamp=session.stamp, world=place.world)
        if loaded is not None:
            session.first_step = loaded.step
            session.ema.load_state(loaded.target_masters)
            session.notices += [
                f"warning: {damage}, so an older state was taken" for damage in loaded.passed_over
            ]
    return session


def choose_run_attention(cfg: CmaeConfig, *, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The kernel for the encoder's heads on a whole image, the run's largest attention."""
    size = read_size(cfg.model)
    tokens = (cfg.views.img_px // cfg.model.patch_size) ** 2 + 1
    return choose_attention(
        cfg.model.attention,
        device=device,
        dtype=dtype,
        head_dim=size.embed_dim // size.num_heads,
        tokens=tokens,
    )


def name_precision(precision: Precision) -> str:
    """For instance "bfloat16 products, float32 weights"."""
    compute, weights = (
        str(dtype).removeprefix("torch.") for dtype in (precision.compute, precision.parameters)
    )
    return f"{compute} products, {weights} weights"


def count_trainable(module: nn.Module) -> int:
    """Trainable parameters, also where ZeRO-3 has split them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)


def describe(session: Session, *, images: int, times: Timetable) -> str:
    """What runs, in a few lines."""
    cfg, model = session.run.cmae, session.engine.module
    kind = "hybrid ViT" if cfg.model.is_hybrid else "ViT"
    name = cfg.model.encoder or f"{kind} {cfg.model.embed_dim} wide, {cfg.model.depth} deep"
    method = "CMAE" if cfg.has_contrast else "MAE"
    device = session.place.device
    hardware = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    lines = [
        f"{method} {name}: {count_trainable(model) / 1e6:.1f} M trainable parameters",
        f"{images:,} images, {times.total_steps} steps of {session.stamp.train_batch_size}, "
        f"{times.steps_per_epoch} an epoch",
        f"{session.place.world.size} x {device.type} ({hardware}), ZeRO {session.stamp.zero_stage}, "
        f"{session.stamp.precision}, attention {session.attention.name}, remat {cfg.model.remat}",
        f"run folder {session.run.out}"
        + (f", resumed at step {session.first_step}" if session.first_step else ""),
    ]
    return "\n".join([*lines, *session.notices])


def _open_folder(run: Run, place: Place) -> None:
    if place.world.is_first:
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            write_text(run.out / "config.json", dump_run(run))
        except OSError as error:
            raise ConfigError(
                f"cannot write into the run folder {run.out} ({error}): choose another with --out"
            ) from None
