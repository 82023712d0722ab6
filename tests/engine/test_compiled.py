"""Compiled blocks: the same losses where they are allowed, a sentence where they are not."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block

from cmae_scale.core.errors import ConfigError
from cmae_scale.engine.zero.start import compile_blocks_
from cmae_scale.models import build_cmae


@pytest.mark.parametrize(
    ("remat", "settings", "told"),
    [
        ("none", {"zero_optimization": {"stage": 3}}, "write zero_optimization.stage=2"),
        ("selective", {}, 'write "full" or "none"'),
    ],
)
def test_what_does_not_go_with_compiled_blocks_is_told(
    tiny_run: Callable[..., Any], remat: Any, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        compile_blocks_(build_cmae(tiny_run().cmae), remat=remat, settings=settings)
    assert told in str(error.value)


def test_every_block_is_compiled_and_keeps_its_name(tiny_run: Callable[..., Any]) -> None:
    model = build_cmae(tiny_run().cmae)
    names = list(model.state_dict())
    compile_blocks_(model, remat="none", settings={})
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == 2 + 2 + 2 + 1  # online, target, pixel decoder, feature decoder
    assert all(block._compiled_call_impl is not None for block in blocks)
    assert list(model.state_dict()) == names


KINDS = """
import json, sys, torch
from timm.models.vision_transformer import Block
from torch._dynamo.utils import counters
from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.engine.zero.start import compile_blocks_
from cmae_scale.models import build_cmae

model = build_cmae(CmaeConfig.model_validate_json(sys.argv[1]))
compile_blocks_(model, remat="none", settings={})
for module in model.modules():
    if isinstance(module, Block):
        module.compile(dynamic=False, backend="eager")
views = torch.randn(2, 4, 3, 16, 16)
with torch.no_grad():  # as CUDA graphs warm up
    model(*views)
model(*views)
print(json.dumps([counters["frames"], counters["graph_break"]]))
"""


def test_no_kind_of_block_stays_uncompiled(tiny_run: Callable[..., Any]) -> None:
    """In a process of its own: here every function is wrapped, to check shapes."""
    decoders = {
        "pixel_decoder": {"depth": 3, "num_heads": 2},
        "feature_decoder": {"depth": 3, "num_heads": 4},
    }
    cfg = tiny_run(cmae={"model": {"skip_redundant": True, **decoders}}).cmae
    done = subprocess.run(
        [sys.executable, "-c", KINDS, cfg.model_dump_json()], capture_output=True, text=True, check=True
    )
    frames, breaks = json.loads(done.stdout.splitlines()[-1])
    assert frames["total"] == frames["ok"] > 8
    assert not breaks


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "stage", "remat", "accumulation"),
    [(1, 0, "none", 1), (2, 1, "full", 2), (2, 2, "none", 1), (1, 2, "deepspeed", 1)],
)
def test_compiled_blocks_give_the_same_losses(
    on_ranks: Callable[..., list[Any]],
    tiny_run: Callable[..., Any],
    train_tiny: Callable[..., Any],
    ranks: int,
    stage: int,
    remat: str,
    accumulation: int,
) -> None:
    """Inductor fuses and so rounds differently, as a change of the attention kernel does."""
    cmae = {"heads": {"norm": "layer"}}

    def train() -> Any:
        from torch._dynamo.utils import counters

        by_deepspeed = remat == "deepspeed"
        settings = {**cmae, "compile": "blocks", "model": {"remat": "none" if by_deepspeed else remat}}
        more = {"activation_checkpointing": {}} if by_deepspeed else {}
        run = tiny_run(ranks=ranks, stage=stage, accumulation=accumulation, cmae=settings, **more)
        return train_tiny(run, steps=3), counters["stats"]["unique_graphs"], dict(counters["graph_break"])

    eager = on_ranks(lambda: train_tiny(tiny_run(cmae=cmae), steps=3), ranks=1)[0]
    answers = on_ranks(train, ranks=ranks)
    for step, expected in eager["losses"].items():
        got = torch.stack([answer["losses"][step] for answer, _, _ in answers]).mean(0)
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    for answer, graphs, breaks in answers:
        assert graphs > 0
        assert not breaks
        for name, value in answer["weights"].items():
            torch.testing.assert_close(value, eager["weights"][name], rtol=0, atol=2e-5, check_dtype=False)
