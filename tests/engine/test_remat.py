"""What is computed twice: with "selective" no matrix product, with "full" all but the last, unused one."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmae_scale.core.settings import Remat
from cmae_scale.engine.remat import choose_block_runner
from cmae_scale.layers.blocks import build_blocks, run_block


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


@pytest.mark.parametrize(
    ("remat", "products", "gelus"), [("none", 0, 1), ("selective", 0, 2), ("full", 5, 2)]
)
def test_only_full_repeats_matrix_products(remat: Remat, products: int, gelus: int) -> None:
    plain, counted = count("none"), count(remat)
    assert counted["gelu"] == gelus
    assert counted["products"] - plain["products"] == products  # of four linear layers and two of attention
