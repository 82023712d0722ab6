"""How a run computes: number format and attention kernels, decided once for all ranks, kept by its states."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from cmae_scale.config.cmae import Attention
from cmae_scale.config.run_file import Run
from cmae_scale.core.collectives import decide_first
from cmae_scale.engine.hardware import name_device
from cmae_scale.engine.precision import Product, read_precision, recall_metadata, settle_precision
from cmae_scale.layers.attention import (
    Arithmetic,
    AttentionChoice,
    AttentionShape,
    choose_attention,
    describe_attention,
)

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
    """The kernels of the newest state, or those that a trial prefers."""
    written = (recall_metadata(run) or {}).get("attention", {})
    if all(written.get(name) == value for name, value in record.items()) and shapes.keys() <= written.keys():
        return {part: AttentionChoice(written[part], is_forced=False) for part in shapes}, []
    chosen = {part: choose_attention("auto", shape, arithmetic) for part, shape in shapes.items()}
    if all(written.get(part, choice.name) == choice.name for part, choice in chosen.items()):
        return chosen, []
    told = f"attention is {describe_attention(chosen)} from here on, which rounds otherwise: the state was "
    return chosen, [f"{told}written on a {written['machine']} in {written['dtype']}"]
