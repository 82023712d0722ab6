import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from cmae_scale.config.sizes import EncoderSize
from cmae_scale.layers.tokens import mask_from_noise
from cmae_scale.models.build import init_transformer_
from cmae_scale.models.encoder import Encoder

SIZE = EncoderSize(embed_dim=32, depth=3, num_heads=4)
PATCH, GRID, SIDE = 4, 6, 24


def build_encoder(*, final_norm: bool = True) -> Encoder:
    encoder = Encoder(SIZE, patch_size=PATCH, grid=GRID, mlp_ratio=2.0, final_norm=final_norm)
    init_transformer_(encoder)
    return encoder


def build_timm_twin(encoder: Encoder, *, final_norm: bool = True) -> VisionTransformer:
    twin = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        mlp_ratio=2.0,
        num_classes=0,
        final_norm=final_norm,
        **SIZE._asdict(),
    )
    twin.load_state_dict(encoder.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize("final_norm", [True, False])
def test_with_nothing_masked_it_is_timms_vision_transformer(rng: torch.Generator, final_norm: bool) -> None:
    encoder = build_encoder(final_norm=final_norm)
    twin = build_timm_twin(encoder, final_norm=final_norm)
    images = torch.randn(3, 3, SIDE, SIDE, generator=rng)
    torch.testing.assert_close(encoder(images, None), twin.forward_features(images))


def test_with_a_mask_it_is_timms_blocks_on_the_kept_tokens(rng: torch.Generator) -> None:
    encoder = build_encoder()
    twin = build_timm_twin(encoder)
    images = torch.randn(3, 3, SIDE, SIDE, generator=rng)
    mask = mask_from_noise(torch.rand(3, 9, generator=rng), grid=GRID, cell=2, ratio=0.65)
    every = twin._pos_embed(twin.patch_embed(images))
    kept = torch.stack(
        [tokens[[0, *row]] for tokens, row in zip(every, (1 + mask.kept).tolist(), strict=True)]
    )
    torch.testing.assert_close(encoder(images, mask), twin.norm(twin.blocks(kept)))


def test_its_state_dict_is_timms_both_ways() -> None:
    encoder = build_encoder()
    twin = build_timm_twin(encoder)
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes
    encoder.load_state_dict(twin.state_dict(), strict=True)


def test_a_full_mask_equals_no_mask(rng: torch.Generator) -> None:
    encoder = build_encoder()
    images = torch.randn(2, 3, SIDE, SIDE, generator=rng)
    mask = mask_from_noise(torch.rand(2, 36, generator=rng), grid=GRID, cell=1, ratio=0.0)
    torch.testing.assert_close(encoder(images, mask), encoder(images, None))


def test_hidden_patches_cannot_be_seen(rng: torch.Generator) -> None:
    encoder = build_encoder()
    images = torch.randn(1, 3, SIDE, SIDE, generator=rng, requires_grad=True)
    mask = mask_from_noise(torch.rand(1, 36, generator=rng), grid=GRID, cell=1, ratio=0.5)
    encoder(images, mask).square().sum().backward()
    assert images.grad is not None
    moved = images.grad.abs().sum(dim=1).view(GRID, PATCH, GRID, PATCH).sum(dim=(1, 3)).flatten()
    assert moved.nonzero().flatten().tolist() == mask.kept[0].tolist()


def test_positions_are_not_trained_and_stay_in_full_precision() -> None:
    encoder = build_encoder()
    assert "pos_embed" not in dict(encoder.named_parameters())
    assert "pos_embed" in encoder.state_dict()
    for parameter in encoder.parameters():  # what DeepSpeed's bf16 engine does
        parameter.data = parameter.data.bfloat16()
    tokens = encoder(torch.randn(1, 3, SIDE, SIDE), None)
    assert encoder.pos_embed.dtype == torch.float32
    assert tokens.dtype == torch.bfloat16


def test_the_residual_stream_is_in_full_precision_under_autocast(rng: torch.Generator) -> None:
    encoder = build_encoder(final_norm=False)
    seen: list[torch.dtype] = []
    encoder.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(torch.randn(1, 3, SIDE, SIDE, generator=rng), None)
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("name", "patch", "total"),
    [
        ("vit_small_patch16_224", 16, 21_665_664),
        ("vit_base_patch16_224", 16, 85_798_656),
        ("vit_large_patch16_224", 16, 303_301_632),
        ("vit_huge_patch14_224", 14, 630_764_800),
    ],
)
def test_it_is_as_large_as_timms_model_of_that_name(name: str, patch: int, total: int) -> None:
    with torch.device("meta"):
        twin = timm.create_model(name, num_classes=0)
        size = EncoderSize(twin.embed_dim, len(twin.blocks), twin.blocks[0].attn.num_heads)
        encoder = Encoder(size, patch_size=patch, grid=224 // patch)
    assert sum(tensor.numel() for tensor in encoder.state_dict().values()) == total
    assert sum(parameter.numel() for parameter in twin.parameters()) == total


def test_without_the_final_norm_no_norm_parameters_exist() -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderSize(768, 12, 12), patch_size=16, grid=14, final_norm=False)
    assert not [name for name in encoder.state_dict() if name.startswith("norm.")]
    assert sum(tensor.numel() for tensor in encoder.state_dict().values()) == 85_797_120
