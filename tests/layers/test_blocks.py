import torch

from cmae_scale.layers.blocks import build_blocks
from cmae_scale.models.encoder import run_block


def test_blocks_drop_nothing_in_training(rng: torch.Generator) -> None:
    blocks = build_blocks(3, embed_dim=16, num_heads=4, mlp_ratio=2.0)
    tokens = torch.randn(2, 5, 16, generator=rng)
    assert torch.equal(blocks.train()(tokens), blocks.eval()(tokens))


def test_a_block_has_as_many_parameters_as_published() -> None:
    with torch.device("meta"):
        blocks = build_blocks(1, embed_dim=768, num_heads=12, mlp_ratio=4.0)
    assert sum(parameter.numel() for parameter in blocks.parameters()) == 7_087_872


def test_running_a_block_is_calling_it(rng: torch.Generator) -> None:
    (block,) = build_blocks(1, embed_dim=16, num_heads=4, mlp_ratio=2.0)
    tokens = torch.randn(2, 5, 16, generator=rng)
    assert torch.equal(run_block(block, tokens), block(tokens))
