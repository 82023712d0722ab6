"""Which attention kernel runs: torch's own pick, one named in the run file, or plain matrix products."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.settings import Attention

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
EXPLICIT = "explicit"  # matmul, softmax, matmul as written in timm


class AttentionChoice(NamedTuple):
    """What runs, and whether every call is held to it or torch stays free to pick again for other shapes."""

    name: str
    is_forced: bool

    @property
    def is_fused(self) -> bool:
        """Whether attention goes through torch's scaled_dot_product_attention."""
        return self.name != EXPLICIT


def choose_attention(
    setting: Attention, *, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int
) -> AttentionChoice:
    """The kernel for this shape, tried out forwards and backwards; `dtype` is that of the matrix products.

    "auto" takes explicit products for low precision on the CPU, because they are 2.6 to 4.4 times as fast
    there as torch's fused kernel (measured at ViT shapes in bf16), else whatever torch picks. Raises
    ConfigError for a named kernel that cannot run, naming those that can.
    """
    query = torch.zeros(1, 2, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    if setting == "auto":
        if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            return AttentionChoice(EXPLICIT, is_forced=False)
        # torch has no public way to ask; this is what scaled_dot_product_attention itself calls
        picked = SDPBackend(torch._fused_sdp_choice(query, query, query))
        names = {kernel: name for name, kernel in KERNELS.items()}
        return AttentionChoice(names.get(picked, picked.name.lower()), is_forced=False)
    if not _can_run(setting, query):
        able = ", ".join(f'"{name}"' for name in KERNELS if _can_run(name, query))
        raise ConfigError(
            f'cmae.model.attention "{setting}" cannot run heads of {head_dim} in '
            f'{str(dtype).removeprefix("torch.")} on {device.type}: write "auto", or one of {able}'
        )
    return AttentionChoice(setting, is_forced=True)


def _can_run(name: str, query: torch.Tensor) -> bool:
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
