"""Which attention kernel runs: torch's own pick, a named one, or plain products, as a short trial says."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmae_scale.config.cmae import Attention
from cmae_scale.core.errors import ConfigError

LEAST_ROUNDS, ROUNDS = 2, 6
HOPELESS = 3.0  # times as long as the best after the least rounds: no more of them
CLEARLY = 1.2  # times as fast as the usual way: what is less is a tie, which the moment must not decide


def time_in_turns(ways: Sequence[Callable[[], object]]) -> list[float]:
    """The least seconds of CPU time that each of `ways` took, after a run that warms it up.

    They take turns, so that whatever else the machine does meets all of them; time in which this process was
    kept waiting does not count, as long as its threads sleep then (see world.wait_without_spinning).
    """
    for way in ways:
        way()
    least_s = [_time(way) for way in ways]
    for number in range(1, ROUNDS):
        for place, way in enumerate(ways):
            if number < LEAST_ROUNDS or least_s[place] < HOPELESS * min(least_s):
                least_s[place] = min(least_s[place], _time(way))
    return least_s


def _time(way: Callable[[], object]) -> float:
    start_s = time.process_time()
    way()
    return time.process_time() - start_s


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
EXPLICIT = "explicit"  # matmul, softmax, matmul as written in timm

# Scores of all heads in a trial, for each thread: half a MB in fp32, about what a core's own cache holds.
# Fewer would spare explicit products the way to memory that they have in a run.
TRIED_SCORES = 1 << 17

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class AttentionChoice(NamedTuple):
    """What runs, and whether every call is held to it or torch stays free to pick again for other shapes."""

    name: str
    is_forced: bool

    @property
    def is_fused(self) -> bool:
        """Whether attention goes through torch's scaled_dot_product_attention."""
        return self.name != EXPLICIT


TORCHS_PICK = AttentionChoice("fused", is_forced=False)  # whatever kernel that is


class AttentionShape(NamedTuple):
    """What attention works on in one part of a model."""

    heads: int
    head_dim: int
    tokens: int
    images: int = 1  # of a micro-batch
    is_trained: bool = True  # else there is no backward pass


class Arithmetic(NamedTuple):
    """Where matrix products are computed, in which format, and whether autocast makes it so."""

    device: torch.device
    dtype: torch.dtype
    is_autocast: bool = False


def choose_attention(
    setting: Attention, shape: AttentionShape, arithmetic: Arithmetic, *, section: str = "cmae.model"
) -> AttentionChoice:
    """What attention of `shape` runs as.

    "auto" is torch's fused kernel; on a CPU explicit products where they are clearly faster in a trial of
    some milliseconds, forwards and, if trained, backwards. A GPU keeps the fused one, which stores no scores.
    Raises ConfigError for a named kernel that cannot run there, naming those that can; `section` of the run
    file has the setting.
    """
    if setting == EXPLICIT:
        return AttentionChoice(EXPLICIT, is_forced=False)
    query = _pack(shape._replace(images=1), arithmetic)[0]
    if setting == "auto":
        if arithmetic.device.type == "cpu" and _is_explicit_faster(shape, arithmetic):
            return AttentionChoice(EXPLICIT, is_forced=False)
        # torch has no public way to ask; this is what scaled_dot_product_attention itself calls
        picked = SDPBackend(torch._fused_sdp_choice(query, query, query))
        names = {kernel: known for known, kernel in KERNELS.items()}
        return AttentionChoice(names.get(picked, picked.name.lower()), is_forced=False)
    if not _can_run(setting, query):
        able = ", ".join(f'"{known}"' for known in [*KERNELS, EXPLICIT] if _can_run(known, query))
        raise ConfigError(
            f'{section}.attention "{setting}" cannot run {shape.tokens} tokens in heads of {shape.head_dim} '
            f"in {str(arithmetic.dtype).removeprefix('torch.')} on {arithmetic.device.type}: "
            f'write "auto", or one of {able}'
        )
    return AttentionChoice(setting, is_forced=True)


def _is_explicit_faster(shape: AttentionShape, arithmetic: Arithmetic) -> bool:
    scores = TRIED_SCORES * torch.get_num_threads()
    images = max(1, min(shape.images, scores // (shape.heads * shape.tokens**2)))
    tried = shape._replace(images=images)
    ways: list[Attend] = [F.scaled_dot_product_attention, attend_explicitly]
    fused_s, explicit_s = time_in_turns([partial(_pass, way, tried, arithmetic) for way in ways])
    return fused_s > CLEARLY * explicit_s


def attend_explicitly(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch heads queries dim"]:
    """What timm's Attention does where it is not fused."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    attended: Tensor = scores.softmax(dim=-1) @ value
    return attended


def _pack(shape: AttentionShape, arithmetic: Arithmetic) -> Tensor:
    """Query, key and value [3, images, heads, tokens, head_dim] as they lie in a model's memory."""
    size = (shape.images, shape.tokens, 3, shape.heads, shape.head_dim)
    packed = torch.full(
        size, 0.5, device=arithmetic.device, dtype=arithmetic.dtype, requires_grad=shape.is_trained
    )
    return packed.permute(2, 0, 3, 1, 4)


def _pass(run_context: Attend, shape: AttentionShape, arithmetic: Arithmetic) -> None:
    """Attention forwards and, if trained, backwards, between the layouts of the linear layers around it."""
    device, dtype, is_autocast = arithmetic
    with torch.set_grad_enabled(shape.is_trained):
        inputs = _pack(shape, arithmetic)
        with torch.autocast(device.type, dtype=dtype if is_autocast else None, enabled=is_autocast):
            output = run_context(*inputs.unbind(0)).transpose(1, 2).flatten(2)
    if shape.is_trained:
        torch.autograd.grad(output, inputs, torch.ones_like(output))


def _can_run(name: str, query: Tensor) -> bool:
    if name == EXPLICIT:
        return True
    query = query.detach().requires_grad_()
    with warnings.catch_warnings(), sdpa_kernel(KERNELS[name]), torch.enable_grad():
        warnings.simplefilter("ignore")  # torch warns with the reason before it raises
        try:
            output = F.scaled_dot_product_attention(query, query, query)
            torch.autograd.grad(output.sum(), query)
        except RuntimeError:
            return False
    return True


def use_attention(choice: AttentionChoice) -> AbstractContextManager[None]:
    """Hold torch to a forced choice. Around the whole training loop: backward may recompute attention."""
    return sdpa_kernel(KERNELS[choice.name]) if choice.is_forced else nullcontext()


def set_attention_(model: nn.Module, choice: AttentionChoice) -> None:
    """Make every attention of timm in `model` fused or explicit."""
    for module in model.modules():
        if isinstance(module, TimmAttention):
            module.fused_attn = choice.is_fused


def describe_attention(choices: Mapping[str, AttentionChoice]) -> str:
    """For instance "flash", or "flash in target encoder, explicit in online encoder and pixel decoder"."""
    parts: dict[str, list[str]] = {}
    for part, choice in choices.items():
        parts.setdefault(choice.name, []).append(part.replace("_", " "))
    if len(parts) == 1:
        return next(iter(parts))
    return ", ".join(f"{name} in {' and '.join(having)}" for name, having in parts.items())
