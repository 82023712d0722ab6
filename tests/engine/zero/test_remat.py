"""What is computed twice: with "selective" no matrix product, with "full" all but the last, unused one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmae_scale.config.cmae import Remat
from cmae_scale.engine.process.group import start_processes
from cmae_scale.engine.zero.remat import choose_block_runner
from cmae_scale.layers.blocks import build_blocks
from cmae_scale.models.encoder import BlockRunner, run_block


class Count(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def count(remat: Remat) -> dict[str, int]:
    torch.manual_seed(0)
    [block] = build_blocks(1, embed_dim=8, num_heads=2, mlp_ratio=2.0)
    block.attn.fused_attn = False
    tokens = torch.randn(2, 3, 8, requires_grad=True)
    run = choose_block_runner(remat, settings={}) or run_block
    with Count() as counted:
        run(block, tokens).sum().backward()
    calls, aten = counted.calls, torch.ops.aten
    products = calls[aten.addmm.default] + calls[aten.mm.default] + calls[aten.bmm.default]
    return {"products": products, "gelu": calls[aten.gelu.default]}


def gradients(run: BlockRunner) -> tuple[set[torch.dtype], list[torch.Tensor]]:
    """Under bf16 autocast as the engine has it, around forward alone: types of a product, all gradients."""
    torch.manual_seed(0)
    [block] = build_blocks(1, embed_dim=8, num_heads=2, mlp_ratio=2.0)
    seen: set[torch.dtype] = set()
    block.mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    tokens = torch.randn(2, 3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(block, tokens)
    output.float().square().sum().backward()
    return seen, [tokens.grad, *(parameter.grad for parameter in block.parameters())]


@pytest.mark.dist
@pytest.mark.parametrize(
    "settings", [{}, {"train_batch_size": 2, "activation_checkpointing": {}}], ids=["ours", "deepspeeds"]
)
def test_what_is_recomputed_has_the_type_of_the_forward_pass(
    on_ranks: Callable[..., list[Any]], settings: dict[str, Any]
) -> None:
    def compare() -> tuple[set[torch.dtype], bool]:
        start_processes()
        runner = choose_block_runner("none" if settings else "full", settings=settings)
        assert runner is not None
        seen, got = gradients(runner)
        return seen, all(map(torch.equal, got, gradients(run_block)[1]))

    assert on_ranks(compare, ranks=1) == [({torch.bfloat16}, True)]


@pytest.mark.parametrize(
    ("remat", "products", "gelus"), [("none", 0, 1), ("selective", 0, 2), ("full", 5, 2)]
)
def test_only_full_repeats_matrix_products(remat: Remat, products: int, gelus: int) -> None:
    plain, counted = count("none"), count(remat)
    assert counted["gelu"] == gelus
    assert counted["products"] - plain["products"] == products  # of four linear layers and two of attention
