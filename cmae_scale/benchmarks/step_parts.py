"""Whole optimizer steps on a CPU: beside the official way, with activations recomputed, through engines.

On random images, whose views are made before. Products of matrices with as many operations say what this CPU
could do at best.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from torch import Tensor

from cmae_scale.benchmarks.noise import BareEngine, Size, Stage, draw_noise, read_noise_run
from cmae_scale.benchmarks.official import official_follow_, official_loss
from cmae_scale.benchmarks.timing import Part, Scale, Way
from cmae_scale.config.run_file import Run
from cmae_scale.config.sizes import read_size
from cmae_scale.core.world import read_world
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.inputs import MicroBatch, StepImages
from cmae_scale.engine.pretraining import accumulate_gradients
from cmae_scale.engine.process.group import RankContext
from cmae_scale.engine.setup import list_attention, start_pretraining
from cmae_scale.engine.zero import start
from cmae_scale.engine.zero.remat import choose_block_runner
from cmae_scale.layers.attention import (
    EXPLICIT,
    Arithmetic,
    AttentionChoice,
    choose_attention,
    set_attention_,
)
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.sizing.flops import count_flops

CPU = torch.device("cpu")
MOMENTUM = 0.996
FP32 = 'torch_autocast={"enabled": false}'
BF16 = 'torch_autocast={"enabled": true, "dtype": "bfloat16"}'
PRODUCT_ROWS = 1536
# all layers of a small vision transformer, and next to nothing in each
NARROW = (
    FP32,
    "cmae.model.encoder=null",
    *(f"cmae.model.{name}" for name in ("embed_dim=48", "depth=12", "num_heads=3", "patch_size=8")),
    *(f"cmae.model.pixel_decoder.{name}" for name in ("embed_dim=48", "num_heads=3")),
    *(f"cmae.model.feature_decoder.{name}" for name in ("embed_dim=48", "num_heads=3")),
    *(f"cmae.views.{name}" for name in ("img_px=32", "master_px=36", "shift_px=5")),
    "cmae.heads.hidden_dim=48",
    "cmae.heads.out_dim=48",
)


@dataclass(frozen=True)
class MadeImages(StepImages):
    """A step's images whose views are there."""

    micro: MicroBatch

    def views(self, *, online: bool, target: bool) -> Iterator[MicroBatch]:
        """The only micro-batch, again and again the same."""
        return iter([self.micro])


def make_images(run: Run) -> MadeImages:
    """One micro-batch of random images with both views."""
    noise = draw_noise(run, step=0, device=CPU)
    (micro,) = noise.views(online=True, target=True)
    return MadeImages(**vars(noise), micro=micro)


def prepare_step(scale: Scale) -> Iterator[Part]:
    """ViT-S and B in fp32 and bf16: our step, bare and through the engine, and the official way's."""
    for size in ("vits",) if scale.is_tiny else ("vits", "vitb"):
        for name, dtype, change in (("fp32", torch.float32, FP32), ("bf16", torch.bfloat16, BF16)):
            with open_runs(size, scale) as read:
                run, redundant = read(change), read(change, "cmae.model.skip_redundant=true")
                images, autocast = make_images(run), None if dtype is torch.float32 else dtype
                model = build_tried(run, dtype)
                check_official(model, run, images)
                ways: dict[str, Way] = {
                    "ours": take_steps(model, images, autocast),
                    "ours, redundant work skipped": take_steps(
                        build_tried(redundant, dtype), images, autocast
                    ),
                    "ours, through the engine": take_engine_steps(run, images),
                    "the official way": take_official_steps(build_cmae(run.cmae), run, images, autocast),
                    "products alone (the limit)": multiply(
                        count_flops(run.cmae).training * scale.step_images, run, dtype
                    ),
                }
                yield Part(ways, scale.step_images, f"image of {size} in {name}")


def prepare_remat(scale: Scale) -> Iterator[Part]:
    """Steps of ViT-S that keep all activations, some, or the blocks' inputs alone."""
    with open_runs("vits", scale) as read:
        run = read(FP32)
        images = make_images(run)
        ways: dict[str, Way] = {}
        for remat in ("none", "selective", "full"):
            model = build_tried(run, torch.float32)
            model.set_remat_(choose_block_runner(remat, settings={}))
            ways[remat] = take_steps(model, images, None)
        yield Part(ways, scale.step_images, "image of vits in fp32")


def prepare_engine(scale: Scale) -> Iterator[Part]:
    """Steps of a deep but narrow model, in which the engine's own work is most: a plain loop, every stage.

    One rank does what each of several does, but for what they say to each other.
    """
    with open_runs("vits", scale) as read:
        plain = read(*NARROW)
        images = make_images(plain)
        ways: dict[str, Way] = {"a plain loop": take_steps(build_tried(plain, torch.float32), images, None)}
        for stage in range(4):
            ways[f"stage {stage}"] = take_engine_steps(read(*NARROW), images, stage=stage)
        apart = read(*NARROW, "zero_optimization.contiguous_gradients=false")
        ways["stage 2, gradients not contiguous"] = take_engine_steps(apart, images, stage=2)
        with patch.object(start, "set_z3_leaf_modules"):
            ways["stage 3, hooks on every layer"] = take_engine_steps(read(*NARROW), images, stage=3)
        trained = sum(parameter.requires_grad for parameter in build_cmae(plain.cmae).parameters())
        yield Part(ways, trained, f"trained tensor of {trained}, a whole step")


@contextmanager
def open_runs(size: str, scale: Scale) -> Iterator[Callable[..., Run]]:
    """Reads runs of one rank, each with a folder of its own."""
    with TemporaryDirectory() as scratch:
        numbers = count()

        def read(*changes: str) -> Run:
            stage = Stage("cpu" if scale.is_tiny else "cuda", False, str(Path(scratch, str(next(numbers)))))
            return read_noise_run(Size(size, scale.step_images, changes), stage)

        yield read


def build_tried(run: Run, dtype: torch.dtype) -> CMAE:
    """The run's model with the attention that a trial prefers here."""
    model = build_cmae(run.cmae)
    arithmetic = Arithmetic(CPU, dtype, dtype is not torch.float32)
    for part, shape in list_attention(run).items():
        set_attention_(model.get_submodule(part), choose_attention("auto", shape, arithmetic))
    return model


def check_official(model: CMAE, run: Run, images: MadeImages) -> None:
    """That the official way has our loss and our gradients, in fp32 and for the same weights."""
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    losses = accumulate_gradients(BareEngine(ours, CPU, None), images)
    loss = compute_officially(theirs, run, images)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.detach(), losses[0], rtol=1e-5, atol=1e-5)
    for (name, one), two in zip(ours.named_children(), theirs.children(), strict=True):
        got, expected = _gather_gradients(one), _gather_gradients(two)
        error = (got - expected).norm() / expected.norm()
        assert len(expected) == 0 or error < 1e-4, f"gradients of {name} differ by {error:.1e} of their size"


def _gather_gradients(part: torch.nn.Module) -> Tensor:
    """In a row: of a bias before a batch norm there is nothing but rounding."""
    found = [parameter.grad.flatten() for parameter in part.parameters() if parameter.grad is not None]
    return torch.cat(found) if found else torch.zeros(0)


def compute_officially(model: CMAE, run: Run, images: MadeImages) -> Tensor:
    """The loss of the official way."""
    micro = images.micro
    assert micro.online is not None
    assert micro.target is not None
    return official_loss(model, micro.online, micro.target, noise=micro.noise, cfg=run.cmae)


def take_steps(model: CMAE, images: MadeImages, autocast: torch.dtype | None) -> Way:
    """Ours without an engine: losses, gradients, fused AdamW, moving average."""
    engine = BareEngine(model, CPU, autocast)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ema = TargetEma(model.target_pairs(), keep_master=False, device=CPU)

    def take() -> None:
        accumulate_gradients(engine, images)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(MOMENTUM)

    return take


def take_engine_steps(run: Run, images: MadeImages, *, stage: int | None = None) -> Way:
    """Ours as a run of one rank takes them, but for the check that all is finite.

    `stage`: at that one of ZeRO, also at one that a resolved run of one rank is not left at.
    """
    if stage is not None:
        zero = {**run.deepspeed.get("zero_optimization", {}), "stage": stage}
        run = replace(run, deepspeed={**run.deepspeed, "zero_optimization": zero})
    state = start_pretraining(run, context=RankContext(read_world(), CPU), data_order="noise")
    assert stage is None or state.engine.zero_optimization_stage() == stage

    def take() -> None:
        with state.use_attention():
            accumulate_gradients(state.engine, images)
            state.engine.step()
            state.ema.update_(MOMENTUM)

    return take


def take_official_steps(model: CMAE, run: Run, images: MadeImages, autocast: torch.dtype | None) -> Way:
    """The official way's: its loss, torch's default AdamW, the moving average of each parameter."""
    set_attention_(model, AttentionChoice(EXPLICIT, is_forced=False))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, pairs = torch.optim.AdamW(trained, lr=1e-4), model.target_pairs()

    def take() -> None:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = compute_officially(model, run, images)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        official_follow_(pairs, MOMENTUM)

    return take


def multiply(flops: int, run: Run, dtype: torch.dtype) -> Way:
    """As many operations in products of a block's first linear layer with PRODUCT_ROWS tokens."""
    width = read_size(run.cmae.model).embed_dim
    left = torch.randn(PRODUCT_ROWS, width).to(dtype)
    right = torch.randn(width, 4 * width).to(dtype)
    out = torch.empty(PRODUCT_ROWS, 4 * width, dtype=dtype)
    times = max(1, round(flops / (2 * PRODUCT_ROWS * 4 * width**2)))

    def take() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return take
