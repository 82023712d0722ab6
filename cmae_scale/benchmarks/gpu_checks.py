"""Whether a GPU computes what the CPU does, the same every time, and without making the host wait."""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from cmae_scale.benchmarks.noise import (
    BareEngine,
    NoiseTraining,
    Size,
    Stage,
    draw_noise,
    make_noise,
    read_noise_run,
)
from cmae_scale.config.run_file import Run
from cmae_scale.engine.ema import TargetEma
from cmae_scale.engine.pretraining import accumulate_gradients
from cmae_scale.engine.process.group import start_processes, stop_processes
from cmae_scale.layers.attention import KERNELS
from cmae_scale.models import CMAE, build_cmae

Figures = dict[str, Any]
Measured = Iterator[tuple[str, Figures]]

CPU = torch.device("cpu")
IMAGES = 512  # through attention: for 64, a host takes longer to launch the kernels than a GPU to run them
# heads, tokens, width of a head: the encoder on kept and on all patches of ViT-L, the decoders
SHAPES = ((16, 69, 64), (16, 197, 64), (16, 197, 32))


def describe_device(stage: Stage) -> Measured:
    """What it is, and its two ceilings: products of bf16 matrices and copies within its memory."""
    if stage.known:
        return
    side = 256 if stage.is_rehearsal else 8192
    left, right = torch.randn(2, side, side, device=stage.device).bfloat16()
    source = torch.randn(side * side, device=stage.device)
    copied = torch.empty_like(source)
    product_s = time_median(lambda: left @ right, stage=stage)
    copy_s = time_median(lambda: copied.copy_(source), stage=stage)
    figures: Figures = {
        "torch": torch.__version__,
        "bf16_tflops": 2e-12 * side**3 / product_s,
        "copy_gb_per_s": 2e-9 * source.nbytes / copy_s,
    }
    if not stage.is_rehearsal:
        properties = torch.cuda.get_device_properties(0)
        figures |= {
            "name": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        }
    yield "device", figures


def benchmark_kernels(stage: Stage) -> Measured:
    """Milliseconds of attention forward and backward, by kernel; None where it cannot run."""
    for heads, tokens, width in SHAPES:
        key = f"{heads} heads of {width}, {tokens} tokens"
        if key in stage.known:
            continue
        shape = (2 if stage.is_rehearsal else IMAGES, heads, tokens, width)
        query, keys, values = (
            torch.randn(shape, device=stage.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )

        def run_context(query: Tensor = query, keys: Tensor = keys, values: Tensor = values) -> None:
            torch.autograd.backward(F.scaled_dot_product_attention(query, keys, values).sum())

        figures: Figures = {}
        for name, kernel in {**KERNELS, "torch's pick": None}.items():
            with warnings.catch_warnings(), nullcontext() if kernel is None else sdpa_kernel(kernel):
                warnings.simplefilter("ignore")
                try:
                    figures[name] = 1e3 * time_median(run_context, stage=stage)
                except RuntimeError:
                    figures[name] = None  # it cannot run these
        yield key, figures


def check_agreement(stage: Stage) -> Measured:
    """Losses and gradients of one step of ViT-S from the same weights, beside the CPU's in fp32."""
    if stage.known:
        return
    run = read_noise_run(Size("vits", micro=8), stage)
    model = build_cmae(run.cmae)
    losses, gradients = _compute_gradients(model, run, device=CPU)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, dtype in {"fp32": None, "bf16 autocast": torch.bfloat16}.items():
        got, ours = _compute_gradients(model, run, device=torch.device(stage.device), autocast=dtype)
        yield (
            name,
            {
                "loss_error": _relative(got, losses),
                **{f"{part}_gradient_error": _relative(ours[part], gradients[part]) for part in gradients},
            },
        )


def check_trace(stage: Stage) -> Measured:
    """Twenty steps of the quickstart's model beside the CPU's in fp32: losses, and how far they differ."""
    if stage.known:
        return
    run = read_noise_run(Size("quickstart", micro=16), stage)
    expected = _train(run, device=CPU)
    yield "CPU fp32", {"losses": expected.tolist()}
    for name, dtype in {"fp32": None, "bf16 autocast": torch.bfloat16}.items():
        got = _train(run, device=torch.device(stage.device), autocast=dtype)
        error = ((got - expected).abs() / expected.abs()).amax(1)
        yield (
            name,
            {"first_error": error[0].item(), "last_error": error[-1].item(), "losses": got.tolist()},
        )


REPEATED = {
    "ZeRO 1": ("zero_optimization.stage=1", "cmae.compile=none"),
    "ZeRO 3": ("zero_optimization.stage=3",),
    "compiled": ("zero_optimization.stage=1", "cmae.compile=auto"),
    "deterministic": ("zero_optimization.stage=1", "cmae.deterministic=true"),
}


def check_repetition(stage: Stage) -> Measured:
    """Whether two runs of the same steps end with the same bits."""
    context = start_processes()
    for key, changes in REPEATED.items():
        if key in stage.known:
            continue
        run = read_noise_run(Size("vits", micro=32, changes=changes), stage)
        ends = []
        for _ in range(2):
            training = NoiseTraining(run, context=context)
            for step in range(5):
                noise = make_noise(run, training.batch, step=step, pin=False)
                losses = training.take(step, noise).tolist()
            ends.append((losses, training.task.gather_encoder()))
            training.close()
        (first, weights), (second, others) = ends
        yield (
            key,
            {
                "are_losses_equal": first == second,
                "are_weights_equal": all(torch.equal(weights[name], others[name]) for name in weights),
                "steps": 5,
            },
        )
    stop_processes()


def check_waits(stage: Stage) -> Measured:
    """How often the host waits for the GPU in a steady step, and where."""
    if stage.known:
        return
    context = start_processes()
    size = Size("vits", 32, ("cmae.compile=none",), accumulation=2)
    training = NoiseTraining(read_noise_run(size, stage), context=context)
    for step in range(3):
        noise = make_noise(training.state.run, training.batch, step=step, pin=not stage.is_rehearsal)
        with _catch_waits(stage) as waits:
            training.take(step, noise)
    yield "a step", {"waits": len(waits), "places": sorted(set(waits))}
    stop_processes()


@contextmanager
def _catch_waits(stage: Stage) -> Iterator[list[str]]:
    """Fills the list, at the end, with the place of every wait inside, as torch warns of them."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not stage.is_rehearsal:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if not stage.is_rehearsal:
                torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places += [f"{_name_module(wait.filename)}:{wait.lineno}" for wait in waits]


def _name_module(file: str) -> str:
    """The file's path below the folder that it was imported from: the same on every machine."""
    folders = [folder for folder in sys.path if folder and Path(file).is_relative_to(folder)]
    return str(Path(file).relative_to(max(folders, key=len))) if folders else file


def time_median(work: Callable[[], Any], *, stage: Stage) -> float:
    """Seconds of `work`: the median of some runs, by the GPU's own clock where there is one."""
    rounds = 2 if stage.is_rehearsal else 20
    for _ in range(1 + rounds // 4):
        work()
    seconds = []
    for _ in range(rounds):
        if stage.is_rehearsal:
            begin_s = perf_counter()
            work()
            seconds.append(perf_counter() - begin_s)
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(1e-3 * begin.elapsed_time(end))
    return median(seconds)


def _learn(engine: BareEngine, run: Run, *, step: int) -> Tensor:
    """Gradients of a step in the engine's model, and its losses on the CPU."""
    return accumulate_gradients(engine, draw_noise(run, step=step, device=engine.device)).cpu()


def _compute_gradients(
    model: CMAE, run: Run, *, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of one step, and the gradients of each part of the model in a row, on the CPU."""
    here = copy.deepcopy(model).to(device)
    losses = _learn(BareEngine(here, device, autocast), run, step=0)
    trained = {name: part for name, part in here.named_children() if not name.startswith("target")}
    return losses, {
        name: torch.cat([p.grad.flatten().cpu() for p in part.parameters() if p.grad is not None])
        for name, part in trained.items()
    }


def _train(run: Run, *, device: torch.device, autocast: torch.dtype | None = None) -> Tensor:
    """[20, 3]: the losses of twenty steps of AdamW with the moving average."""
    model = build_cmae(run.cmae).to(device)
    engine = BareEngine(model, device, autocast)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ema = TargetEma(model.target_pairs(), keep_master=False, device=device)
    losses = []
    for step in range(20):
        losses.append(_learn(engine, run, step=step))
        optimizer.step()
        optimizer.zero_grad()
        ema.update_(0.99)
    return torch.stack(losses)


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
