"""Recomputing activations in backward instead of keeping them: how a model's blocks are run."""

from typing import Any

import deepspeed
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cmae_scale.config.cmae import Remat
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.encoder import BlockCall, BlockRunner

# A linear layer on [batch, tokens, embed] dispatches to addmm (mm without bias), explicit attention to bmm.
_aten = torch.ops.aten
_KEPT_OPS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def choose_block_runner(remat: Remat, *, settings: dict[str, Any]) -> BlockRunner | None:
    """How to run `block(tokens)`: None keeps all activations.

    An "activation_checkpointing" object among DeepSpeed's settings turns on its own full checkpointing, with
    its partitioning and CPU options. Otherwise `remat` decides: "full" keeps each block's input, "selective"
    also the results of matrix products and attention. Raises ConfigError when both are asked for.
    """
    if "activation_checkpointing" in settings:
        if remat == "selective":
            raise ConfigError(
                'cmae.model.remat "selective" and "activation_checkpointing" exclude each other: drop one'
            )
        deepspeed.checkpointing.configure(None, deepspeed_config=settings)
        return _run_through_deepspeed
    return {"none": None, "full": _run_full, "selective": _run_selective}[remat]


def adapt_settings(remat: Remat, *, settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings with which "selective" is correct under ZeRO-3: its own linear layer switched off.

    That layer adds the bias in place, into the very matrix product that was kept: recomputation would add it
    a second time. Raises ConfigError when the run file asks for it.
    """
    zero = settings.get("zero_optimization", {})
    if remat != "selective" or zero.get("stage", 0) != 3:
        return settings
    if zero.get("memory_efficient_linear", False):
        raise ConfigError(
            'cmae.model.remat "selective" and zero_optimization.memory_efficient_linear give wrong gradients '
            "together: drop one"
        )
    return {**settings, "zero_optimization": {**zero, "memory_efficient_linear": False}}


def _run_through_deepspeed(block: BlockCall, tokens: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _as_tensor(block(tokens))
    return _as_tensor(deepspeed.checkpointing.checkpoint(_hold_autocast(block, tokens.device.type), tokens))


def _hold_autocast(block: BlockCall, device_type: str) -> BlockCall:
    """`block` under the autocast of this moment whenever it runs.

    DeepSpeed's checkpoint recomputes where backward happens to be, outside of autocast: in fp32, so that
    gradients would be of another function than the loss, at a multiple of the time.
    """
    is_on, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

    def run(tokens: Tensor) -> Any:
        with torch.autocast(device_type, dtype=dtype, enabled=is_on):
            return block(tokens)

    return run


def _run_full(block: BlockCall, tokens: Tensor) -> Tensor:
    return _as_tensor(checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False))


def _run_selective(block: BlockCall, tokens: Tensor) -> Tensor:
    return _as_tensor(
        checkpoint(
            block, tokens, use_reentrant=False, preserve_rng_state=False, context_fn=_keep_matrix_products
        )
    )


def _keep_matrix_products() -> Any:
    keep, replay = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return keep, _ReplayKept(replay)


class _ReplayKept(TorchDispatchMode):
    """Gives back kept results in recomputation and lets everything else run.

    torch's own mode wants recomputation to be the forward pass op by op. Under ZeRO-3 it is not: the hooks
    that gather weights reshape more or fewer of them, as others are at hand.
    """

    def __init__(self, replay: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._replay = replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KEPT_OPS:
            return self._replay.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _policy(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value
