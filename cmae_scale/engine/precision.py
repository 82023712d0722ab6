"""In which number format and by which attention kernels a run computes: named, or measured and kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

from cmae_scale.checkpoints.commit import read_newest_metadata
from cmae_scale.config.cmae import Attention
from cmae_scale.config.precision import (
    AUTOCAST,
    SECTIONS,
    FormatName,
    is_left_to_machine,
    list_formats,
    read_formats,
    write_autocast,
)
from cmae_scale.config.run_file import Run
from cmae_scale.core.collectives import decide_first
from cmae_scale.engine.process.devices import name_device
from cmae_scale.layers.attention import (
    CLEARLY,
    Arithmetic,
    AttentionChoice,
    AttentionShape,
    choose_attention,
    describe_attention,
    time_in_turns,
)

DTYPES: Mapping[FormatName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of matrix products; `parameters` that of the weights the model runs on."""

    compute: torch.dtype
    parameters: torch.dtype

    @property
    def needs_master(self) -> bool:
        """Whether the weights the model runs on are too coarse for an EMA (facts: 0.996 stalls in bf16)."""
        return self.parameters is not torch.float32


class Product(NamedTuple):
    """A linear layer of a run: `rows` tokens at a time, from `inner` numbers to `outer`."""

    rows: int
    inner: int
    outer: int

    def cut(self) -> "Product":
        """As much of it as shows which format is faster, in a millisecond or two."""
        return Product(min(self.rows, 128), min(self.inner, 256), min(self.outer, 1024))


class Trial(NamedTuple):
    """What a machine is best at, and why."""

    best: FormatName
    why: str


def read_precision(settings: dict[str, Any]) -> Precision:
    """The number formats that a ds_config asks for."""
    formats = read_formats(settings)
    return Precision(DTYPES[formats.compute], DTYPES[formats.parameters])


def settle_precision(run: Run, *, device: torch.device, product: Product) -> tuple[Run, list[str]]:
    """The run with a number format, and what its user should know of that. All ranks together.

    Where the run file leaves it to the machine, the newest checkpoint in the run folder decides, and else the
    first rank for all: by a trial of `product` on a CPU, by what it has in hardware on a GPU. What the file
    names is obeyed.
    """
    settings, notices = decide_first(partial(_decide, run, device, product))
    return replace(run, deepspeed=settings), notices


def recall_metadata(run: Run) -> dict[str, Any] | None:
    """What wrote the state that the run goes on from; None where it starts anew."""
    if run.settings.checkpoint.resume == "never":
        return None
    return read_newest_metadata(run.out / "checkpoints")


def _decide(run: Run, device: torch.device, product: Product) -> tuple[dict[str, Any], list[str]]:
    settings = run.deepspeed
    candidates = list_formats(settings, half=name_half(device))
    trial = try_out(candidates[-1], device=device, product=product)
    if not is_left_to_machine(settings):
        return settings, [] if trial.best == candidates[-1] else [_warn(settings, trial)]
    if (written := recall_metadata(run)) is not None:
        kept = _take_over(settings, written["run"])
        return kept, [_tell_kept(read_formats(kept).compute, trial)]
    compute = trial.best if trial.best in candidates else candidates[0]
    told = f"precision: {compute} products, float32 weights: {trial.why}"
    return write_autocast(settings, compute), [told]


def _take_over(settings: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the sections of an earlier run that say in which formats it computed."""
    others = {name: value for name, value in settings.items() if name not in SECTIONS}
    return {**others, **{name: written[name] for name in SECTIONS if name in written}}


def _tell_kept(compute: FormatName, trial: Trial) -> str:
    told = f"precision: {compute} products, as in the state from which the run goes on"
    return told if compute == trial.best else f"{told}; a new run would have {trial.best} here: {trial.why}"


def _warn(settings: Mapping[str, Any], trial: Trial) -> str:
    engine = next((name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")), None)
    remedy = f"{AUTOCAST}.enabled=auto " + (f"{engine}.enabled=false" if engine else f"{AUTOCAST}.dtype=auto")
    return f"warning: a slow precision is named ({trial.why}): write {remedy}"


def name_half(device: torch.device) -> FormatName:
    """The format of two bytes that `device` multiplies in hardware, or that is worth a trial on a CPU.

    Source: CUDA C++ programming guide, table of arithmetic throughput: bf16 from compute capability 8.0.
    """
    if device.type == "cuda":  # AMD's too, which all have bf16
        has_bf16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return "bfloat16" if has_bf16 else "float16"
    return "bfloat16" if device.type == "cpu" or get_accelerator().is_bf16_supported() else "float16"


def try_out(low: FormatName, *, device: torch.device, product: Product) -> Trial:
    """Whether `low` is better than fp32 on `device`: on a CPU by computing `product` in both."""
    if low == "float32":
        return Trial(low, "it is named")
    if device.type == "cpu":
        return _try_on_cpu(low, product.cut())
    name, half = name_device(device), name_half(device)
    if low == "bfloat16" and half != low:
        return Trial(half, f"the {name} has no bfloat16 in hardware")
    return Trial(low, f"the {name} has {low} in hardware")


def _try_on_cpu(low: FormatName, product: Product) -> Trial:
    full_s, low_s = time_in_turns([partial(_multiply, product, name) for name in ("float32", low)])
    ratio = full_s / low_s
    shape = f"{product.rows} x {product.inner} @ {product.inner} x {product.outer}, forwards and backwards"
    told = f"is {ratio:.2g} times as fast" if ratio >= 1 else f"takes {1 / ratio:.2g} times as long"
    why = f"{low} {told} as float32 on this CPU ({shape})"
    return Trial(low if ratio >= CLEARLY else "float32", why)


def _multiply(product: Product, compute: FormatName) -> None:
    """A linear layer with fp32 weights, as autocast runs it."""
    rows = torch.full((product.rows, product.inner), 0.5, requires_grad=True)
    weight = torch.full((product.outer, product.inner), 0.5, requires_grad=True)
    is_low = compute != "float32"
    with (
        torch.enable_grad(),
        torch.autocast("cpu", dtype=DTYPES[compute] if is_low else None, enabled=is_low),
    ):
        output = F.linear(rows, weight)
    torch.autograd.grad(output, [rows, weight], torch.ones_like(output))


Choices = Mapping[str, AttentionChoice]  # by part of the model

_SECTIONS = {"cmae": "cmae.model", "transfer": "transfer.encoder"}  # that have the setting "attention"


class Settled(NamedTuple):
    """A run with nothing left to the machine, and the attention kernel of each part of its model."""

    run: Run
    attention: Choices
    record: dict[str, str]  # of the kernels and where they were chosen, for the metadata of its states
    notices: list[str]  # for the user


def settle_arithmetic(
    run: Run,
    *,
    device: torch.device,
    product: Product,
    attention: Attention,
    shapes: Mapping[str, AttentionShape],
) -> Settled:
    """The number format first, then for each of `shapes` a kernel as `attention` asks. All ranks together.

    Kernels round differently: a run that goes on keeps those of its state, if they were tried on such a
    machine. Raises ConfigError for a named kernel that cannot run one of `shapes`.
    """
    run, notices = settle_precision(run, device=device, product=product)
    precision = read_precision(run.deepspeed)
    arithmetic = Arithmetic(device, precision.compute, precision.compute is not precision.parameters)
    dtype = str(precision.compute).removeprefix("torch.")
    record = {"setting": attention, "machine": name_device(device), "dtype": dtype}
    if attention == "auto":
        chosen, told = decide_first(partial(_try_out, run, shapes, arithmetic, record))
        notices = notices + told
    else:
        section = _SECTIONS[run.kind]
        chosen = {
            part: choose_attention(attention, shape, arithmetic, section=section)
            for part, shape in shapes.items()
        }
    record |= {part: choice.name for part, choice in chosen.items()}
    return Settled(run, chosen, record, notices)


def _try_out(
    run: Run, shapes: Mapping[str, AttentionShape], arithmetic: Arithmetic, record: Mapping[str, str]
) -> tuple[Choices, list[str]]:
    """The kernels of the newest checkpoint, or those that a trial prefers."""
    written = (recall_metadata(run) or {}).get("attention", {})
    if all(written.get(name) == value for name, value in record.items()) and shapes.keys() <= written.keys():
        return {part: AttentionChoice(written[part], is_forced=False) for part in shapes}, []
    chosen = {part: choose_attention("auto", shape, arithmetic) for part, shape in shapes.items()}
    if all(written.get(part, choice.name) == choice.name for part, choice in chosen.items()):
        return chosen, []
    told = f"attention is {describe_attention(chosen)} from here on, which rounds otherwise: the state was "
    return chosen, [f"{told}written on a {written['machine']} in {written['dtype']}"]
