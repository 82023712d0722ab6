import pytest
import torch
from torch import Tensor, nn

from cmae_scale.config.cmae import DecoderConfig, FeatureDecoderConfig, PixelDecoderConfig
from cmae_scale.layers.tokens import TokenMask, mask_from_noise
from cmae_scale.models.build import init_transformer_
from cmae_scale.models.decoder import FeatureDecoder, FeatureHead, MaskedDecoder, PixelDecoder

WIDTH, GRID, VALUES = 24, 4, 12
CFG = PixelDecoderConfig(depth=3, embed_dim=16, num_heads=2, mlp_ratio=2.0)


@pytest.fixture
def mask(rng: torch.Generator) -> TokenMask:
    return mask_from_noise(torch.rand(2, 16, generator=rng), grid=GRID, cell=1, ratio=0.6)


@pytest.fixture
def latents(rng: torch.Generator, mask: TokenMask) -> Tensor:
    return torch.randn(2, 1 + mask.kept.shape[1], WIDTH, generator=rng)


def complete_plainly(completion: MaskedDecoder, latents: Tensor, mask: TokenMask, *, depth: int) -> Tensor:
    """Patch by patch the narrowed token or the mask token, plus its position; then the blocks."""
    rows = []
    for image, kept in zip(latents, mask.kept.tolist(), strict=True):
        visible = image @ completion.narrow.weight.T + completion.narrow.bias
        row = [visible[0]]
        for patch in range(GRID * GRID):
            token = visible[1 + kept.index(patch)] if patch in kept else completion.mask_token[0, 0]
            row.append(token + completion.pos_embed[0, 1 + patch])
        rows.append(torch.stack(row))
    tokens = torch.stack(rows)
    for block in completion.blocks[:depth]:
        tokens = block(tokens)
    return tokens


def test_every_patch_gets_its_token_and_its_position(latents: Tensor, mask: TokenMask) -> None:
    completion = MaskedDecoder(CFG, width_in=WIDTH, grid=GRID, early_depth=2)
    init_transformer_(completion)
    last, early = completion(latents, mask)
    torch.testing.assert_close(last, complete_plainly(completion, latents, mask, depth=3))
    torch.testing.assert_close(early, complete_plainly(completion, latents, mask, depth=2))


def test_early_tokens_are_kept_only_when_asked_for(latents: Tensor, mask: TokenMask) -> None:
    assert MaskedDecoder(CFG, width_in=WIDTH, grid=GRID)(latents, mask).early is None


def test_pixels_are_those_of_the_hidden_patches_of_a_full_prediction(
    latents: Tensor, mask: TokenMask
) -> None:
    decoder = PixelDecoder(CFG, width_in=WIDTH, grid=GRID, values=VALUES)
    init_transformer_(decoder)
    everywhere = decoder.predict(decoder.norm(decoder.completion(latents, mask).last[:, 1:]))
    pixels = decoder(latents, mask).pixels
    for image, hidden in enumerate(mask.hidden):
        torch.testing.assert_close(pixels[image], everywhere[image, hidden])


def test_the_feature_is_the_mean_of_what_is_predicted_for_every_patch(rng: torch.Generator) -> None:
    head = FeatureHead(16, WIDTH)
    init_transformer_(head)
    tokens = torch.randn(2, 17, 16, generator=rng)
    each = torch.stack([head.predict(head.norm(tokens[:, 1 + patch])) for patch in range(16)])
    torch.testing.assert_close(head(tokens), each.mean(dim=0))


def test_autocast_does_not_lower_a_features_precision(rng: torch.Generator) -> None:
    head = FeatureHead(16, WIDTH)
    tokens = torch.randn(2, 17, 16, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        feature = head(tokens)
    assert feature.dtype == torch.float32
    assert torch.equal(feature, head(tokens))


def test_a_feature_decoder_pools_its_own_completed_tokens(latents: Tensor, mask: TokenMask) -> None:
    decoder = FeatureDecoder(CFG, width_in=WIDTH, grid=GRID)
    init_transformer_(decoder)
    tokens = complete_plainly(decoder.completion, latents, mask, depth=3)
    feature = decoder(latents, mask)
    assert feature.shape == (2, WIDTH)
    torch.testing.assert_close(feature, decoder.head(tokens))


def test_positions_stay_in_full_precision_and_out_of_the_optimizer(latents: Tensor, mask: TokenMask) -> None:
    completion = MaskedDecoder(CFG, width_in=WIDTH, grid=GRID)
    for parameter in completion.parameters():
        parameter.data = parameter.data.bfloat16()
    tokens = completion(latents.bfloat16(), mask).last
    assert "pos_embed" not in dict(completion.named_parameters())
    assert completion.pos_embed.dtype == torch.float32
    assert tokens.dtype == torch.bfloat16


def count(module: nn.Module) -> tuple[int, int]:
    total = sum(tensor.numel() for tensor in module.state_dict().values())
    return total, sum(parameter.numel() for parameter in module.parameters())


def test_the_decoders_of_vit_base_are_as_large_as_published() -> None:
    feature: DecoderConfig = FeatureDecoderConfig()
    with torch.device("meta"):
        assert count(PixelDecoder(PixelDecoderConfig(), width_in=768, grid=14, values=768)) == (
            26_109_184,
            26_008_320,
        )
        assert count(FeatureDecoder(feature, width_in=768, grid=14)) == (7_194_880, 7_094_016)
