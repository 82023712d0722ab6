"""Memory that training really takes: real steps on random images, in fresh processes.

On a GPU torch counts the bytes of its tensors itself. On a CPU the operating system is asked.

Resident memory says what tensors take only if the allocator gives back what is freed. So glibc is told to map
every tensor of more than 64 KiB by itself, which it unmaps when the tensor dies, and to share one arena. What
the interpreter, libraries and a first small state of the same kind take is the baseline; the peak is the
kernel's own high-water mark after that.
"""

import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmae_scale.config.batches import BatchSizes, plan_batch
from cmae_scale.config.cmae import Attention, CmaeConfig
from cmae_scale.config.run_file import Run, read_run, resolve_run
from cmae_scale.config.schedules import TargetMomentum
from cmae_scale.data.stream import CropBatch
from cmae_scale.engine.pretraining import Pretraining
from cmae_scale.engine.process.group import RankContext, start_processes, stop_processes
from cmae_scale.engine.setup import start_pretraining, watch_health
from cmae_scale.engine.train_state import TrainState
from cmae_scale.planning.forecast import assume_precision, choose_kernel, describe_job
from cmae_scale.sizing.memory import Moment, predict_peak
from cmae_scale.sizing.zero import Device

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_SMALL = {"encoder": None, "embed_dim": 16, "depth": 1, "num_heads": 1}
_SMALL_DECODER = {"depth": 1, "embed_dim": 16, "num_heads": 1}


STEPS = 3


class Case(NamedTuple):
    """A shipped run file, changed, on so many ranks."""

    ranks: int
    run_file: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people and records."""
        changes = " ".join(change.removeprefix("cmae.") for change in self.overrides)
        return f"{self.ranks} x {Path(self.run_file).stem} {changes}"


def _case(size: str, *, micro: int, ranks: int = 1, steps: int = 1, changes: str = "") -> Case:
    total = f"train_batch_size={micro * ranks * steps}"
    return Case(
        ranks,
        f"ds_configs/{size}.json",
        (total, f"train_micro_batch_size_per_gpu={micro}", *changes.split()),
    )


_FP32 = "torch_autocast.enabled=false"

# every stage, both rank counts, all formats and ways of rematerialisation, accumulation, two sizes, and MAE
CASES = (
    _case("vits", micro=8, changes=f"zero_optimization.stage=0 {_FP32}"),
    _case("vits", micro=16),
    _case("vits", micro=16, changes="cmae.model.remat=selective"),
    _case("vits", micro=32, changes="cmae.model.remat=full"),
    _case("vits", micro=16, changes=f"zero_optimization.stage=2 {_FP32} bf16.enabled=true"),
    _case("vits", micro=8, steps=2, changes="zero_optimization.stage=2"),
    _case("vits", micro=8, ranks=2, changes=f"zero_optimization.stage=0 {_FP32}"),
    _case("vits", micro=8, ranks=2, changes="zero_optimization.stage=2"),
    _case("vits", micro=8, ranks=2, changes="zero_optimization.stage=3"),
    _case("vitb", micro=8, changes="cmae.model.remat=full"),
    _case("mae_vitb", micro=16),
    # chosen after the rules of models/zero.py and memory.py were final, which the cases above helped to find
    _case("vitb", micro=4, ranks=2, changes="cmae.model.remat=selective"),
    _case("vits", micro=8, changes=f"zero_optimization.stage=0 {_FP32} bf16.enabled=true"),
    _case("vits", micro=4, steps=3, changes=_FP32),
    _case("vitb", micro=6, ranks=2, changes="zero_optimization.stage=3 cmae.model.remat=full"),
)


class Footprint(NamedTuple):
    """Bytes of one rank: before the model is built, and at most from then on."""

    baseline_bytes: int
    peak_bytes: int

    @property
    def grown_bytes(self) -> int:
        """What training added."""
        return self.peak_bytes - self.baseline_bytes


class Comparison(NamedTuple):
    """What a case took and what was predicted, in bytes of the rank that took most."""

    case: Case
    baseline_bytes: int
    measured_bytes: int
    predicted: Moment

    @property
    def deviation(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted.total_bytes / self.measured_bytes - 1

    def record(self) -> dict[str, Any]:
        """For a JSON record."""
        return {
            "baseline_bytes": self.baseline_bytes,
            "measured_bytes": self.measured_bytes,
            "predicted_bytes": self.predicted.total_bytes,
            "predicted_by_measured": self.predicted.total_bytes / self.measured_bytes,
            "predicted_parts": self.predicted._asdict(),
        }


def compare_footprints(cases: Sequence[Case], *, device: Device) -> Iterator[Comparison]:
    """Measure one case after the other, in fresh processes, and predict it."""
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            run = read_run(case.run_file, [*case.overrides, f"cmae.out={folder}/run"])
            run = hold_to_plan(run, device=device)
            prints = measure_footprint(run, ranks=case.ranks)
        batch = plan_batch(run.deepspeed, ranks=case.ranks)
        resolved = resolve_run(run, batch=batch, total_steps=1, warmup_steps=0)
        yield Comparison(
            case,
            baseline_bytes=max(one.baseline_bytes for one in prints),
            measured_bytes=max(one.grown_bytes for one in prints),
            predicted=predict_peak(describe_job(resolved, batch=batch, ranks=case.ranks, device=device)),
        )


def hold_to_plan(run: Run, *, device: Device) -> Run:
    """The run in the precision and, on a CPU, with the kernel that a plan assumes; it might choose others."""
    run = assume_precision(run, "bfloat16")
    if device == "cuda":
        return run
    kernel: Attention = "explicit" if choose_kernel(run, device=device) == "explicit" else "flash"
    model = run.cmae.model.model_copy(update={"attention": kernel})
    return replace(run, settings=run.cmae.model_copy(update={"model": model}))


def measure_footprint(
    run: Run, *, ranks: int, steps: int = STEPS, timeout_s: float = 1800
) -> list[Footprint]:
    """The footprint of every rank of an unresolved run, in `ranks` fresh processes of this machine.

    Its folder is written to; no shards are needed. RuntimeError when a process ends without an answer.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    answers: Any = context.Queue()
    with _environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), **_MALLOC):
        processes = []
        for rank in range(ranks):
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            processes.append(context.Process(target=_be_rank, args=(run, ranks, steps, answers)))
            processes[-1].start()
    try:
        found = dict(answers.get(timeout=timeout_s) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    if failed := [text for text in found.values() if isinstance(text, str)]:
        raise RuntimeError(failed[0])
    return [found[rank] for rank in range(ranks)]


def train_on_noise(run: Run, *, context: RankContext, batch: BatchSizes, steps: int) -> TrainState:
    """The state after steps on random images that hold what the training loop holds, as long as it does."""
    cfg = run.cmae
    state = start_pretraining(run, context=context, data_order="noise")
    momentum = TargetMomentum(cfg.target.momentum, total_steps=steps)
    task = Pretraining(state, batch, momentum, watch_health(state))

    def update(_: torch.Tensor) -> bool:
        state.engine.step()
        return bool(state.engine.was_step_applied())

    crops = 2 if cfg.views.target_crop == "random" else 1
    shape = (batch.micro, crops, 3, cfg.views.master_px, cfg.views.master_px)
    with state.use_attention():
        for step in range(steps):
            parts = []
            for micro in range(batch.accumulation):
                images = torch.randint(0, 256, shape, dtype=torch.uint8)
                labels = torch.zeros(batch.micro, dtype=torch.int64)
                parts.append(CropBatch(images, labels, (), step, micro))
            task.take_step(parts, step=step, update=update)
    return state


def _be_rank(run: Run, ranks: int, steps: int, answers: Any) -> None:
    rank = int(os.environ["RANK"])
    try:
        answers.put((rank, _measure(run, ranks=ranks, steps=steps)))
    except BaseException as error:  # whatever it is, the parent waits for an answer
        answers.put((rank, f"rank {rank}: {type(error).__name__}: {error}"))
        raise


def _measure(run: Run, *, ranks: int, steps: int) -> Footprint:
    context = start_processes()
    batch = plan_batch(run.deepspeed, ranks=ranks)
    resolved = resolve_run(run, batch=batch, total_steps=steps, warmup_steps=0)
    small = replace(resolved, settings=_shrink(resolved.cmae))
    micro = 2
    total = micro * batch.accumulation * ranks
    warm = BatchSizes(total=total, micro=micro, accumulation=batch.accumulation)
    train_on_noise(small, context=context, batch=warm, steps=2)
    gc.collect()
    baseline = _start_counting(context.device)
    train_on_noise(resolved, context=context, batch=batch, steps=steps)
    peak = _read_peak(context.device)
    stop_processes()
    return Footprint(baseline, peak)


def _start_counting(device: torch.device) -> int:
    """Bytes that are taken now; the peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark
    return _read_status("VmRSS")


def _read_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _read_status("VmHWM")


def _shrink(cfg: CmaeConfig) -> CmaeConfig:
    """The same run with a model that weighs nothing."""
    model = cfg.model
    decoders = {
        "pixel_decoder": model.pixel_decoder.model_copy(update=_SMALL_DECODER),
        "feature_decoder": model.feature_decoder.model_copy(update=_SMALL_DECODER),
    }
    heads = cfg.heads.model_copy(update={"hidden_dim": 16, "out_dim": 16})
    return cfg.model_copy(update={"model": model.model_copy(update={**_SMALL, **decoders}), "heads": heads})


def _read_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
