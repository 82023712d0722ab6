from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn

from cmae_scale.config.cmae import CmaeConfig, ConvConfig, ModelConfig, ViewsConfig
from cmae_scale.config.sizes import ConvStages, EncoderSize
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.tokens import TokenMask, mask_from_noise
from cmae_scale.models import CMAE, build_cmae
from cmae_scale.models.build import init_transformer_
from cmae_scale.models.hybrid import HybridEncoder
from cmae_scale.models.hybrid_classifier import HybridClassifier
from cmae_scale.models.networks import build_network, draw_weights
from cmae_scale.models.pretrained import PretrainedEncoder, online_encoder

BATCH, SIDE, PATCH, GRID, HEADS = 3, 48, 8, 6, 3
SIZE, STAGES = EncoderSize(24, 2, HEADS), ConvStages((8, 12), (2, 1), 3.0)


def shake_(model: nn.Module) -> None:
    """Move every parameter off its starting value, so that no bias is zero and no norm the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def build(*, final_norm: bool = True) -> HybridEncoder:
    encoder = HybridEncoder(SIZE, STAGES, patch_size=PATCH, grid=GRID, mlp_ratio=2.0, final_norm=final_norm)
    init_transformer_(encoder)
    shake_(encoder)
    return encoder


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=rng)


@pytest.fixture(params=[(2, 0.65), (1, 0.75), (3, 0.5)], ids=["cells of 2", "single patches", "cells of 3"])
def mask(rng: torch.Generator, request: pytest.FixtureRequest) -> TokenMask:
    cell, ratio = request.param
    noise = torch.rand(BATCH, (GRID // cell) ** 2, generator=rng)
    return mask_from_noise(noise, grid=GRID, cell=cell, ratio=ratio)


def hidden_of(mask: TokenMask) -> Tensor:
    return torch.zeros(BATCH, GRID**2).scatter(1, mask.hidden, 1.0)


def test_it_is_convmae_computed_on_whole_maps(
    images: Tensor, mask: TokenMask, plain_convmae: Callable[..., Tensor]
) -> None:
    encoder = build()
    expected = plain_convmae(encoder.state_dict(), images, hidden_of(mask), heads=HEADS)
    torch.testing.assert_close(encoder(images, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("final_norm", [True, False])
def test_without_a_mask_it_is_convmae_on_the_whole_image(
    images: Tensor, plain_convmae: Callable[..., Tensor], final_norm: bool
) -> None:
    encoder = build(final_norm=final_norm)
    expected = plain_convmae(encoder.state_dict(), images, torch.zeros(BATCH, GRID**2), heads=HEADS)
    torch.testing.assert_close(encoder(images, None), expected, rtol=1e-5, atol=2e-5)


def test_gradients_are_those_of_whole_maps(
    images: Tensor, mask: TokenMask, plain_convmae: Callable[..., Tensor]
) -> None:
    encoder = build().double()
    images = images.double()
    encoder(images, mask).square().sum().backward()
    ours = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    leaves = {name: p.detach().clone().requires_grad_() for name, p in encoder.named_parameters()}
    state = {**encoder.state_dict(), **leaves}
    plain_convmae(state, images, hidden_of(mask).double(), heads=HEADS).square().sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours[name], leaf.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_hidden_patches_cannot_be_seen(images: Tensor, mask: TokenMask) -> None:
    encoder = build()
    images = images[:1].requires_grad_()
    first = TokenMask(mask.kept[:1], mask.hidden[:1])
    encoder(images, first).square().sum().backward()
    moved = images.grad.abs().sum(dim=1).view(GRID, PATCH, GRID, PATCH).sum(dim=(1, 3)).flatten()
    assert moved.nonzero().flatten().tolist() == mask.kept[0].tolist()


def test_tokens_come_in_the_masks_order(images: Tensor, mask: TokenMask) -> None:
    encoder = build()
    turned = TokenMask(mask.kept.flip(1), mask.hidden)
    torch.testing.assert_close(encoder(images, turned), encoder(images, mask).flip(1))


def test_a_full_mask_equals_no_mask(images: Tensor, rng: torch.Generator) -> None:
    encoder = build()
    mask = mask_from_noise(torch.rand(BATCH, GRID**2, generator=rng), grid=GRID, cell=1, ratio=0.0)
    torch.testing.assert_close(encoder(images, mask), encoder(images, None))


def test_the_stages_keep_full_precision_under_autocast(images: Tensor, mask: TokenMask) -> None:
    encoder = build()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = encoder.forward_stages(images, mask)
    assert {output.dtype for output in outputs} == {torch.float32}
    full = encoder.forward_stages(images, mask)
    for output, expected in zip(outputs, full, strict=True):
        assert (output - expected).norm() < 0.02 * expected.norm()


def test_in_low_precision_positions_stay_in_full(images: Tensor, mask: TokenMask) -> None:
    encoder = build()
    full = encoder(images, mask)
    for parameter in encoder.parameters():  # what DeepSpeed's bf16 engine does
        parameter.data = parameter.data.bfloat16()
    tokens = encoder(images, mask)
    assert encoder.pos_embed.dtype == torch.float32
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - full).norm() < 0.05 * full.norm()


def test_starting_values_are_those_of_convmae() -> None:
    """Xavier for linear layers and the last embedding's convolution, torch's own for the others."""
    encoder = HybridEncoder(EncoderSize(96, 1, 3), ConvStages((64, 80), (1, 1), 4.0), patch_size=16, grid=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    init_transformer_(encoder)
    state = encoder.state_dict()
    assert [name for name, tensor in state.items() if tensor.isnan().any()] == []
    limits = {
        "patch_embed1.proj.weight": (1 / 48) ** 0.5,
        "patch_embed2.proj.weight": (1 / 256) ** 0.5,
        "patch_embed3.proj.weight": (6 / (320 + 96)) ** 0.5,
        "patch_embed4.weight": (6 / (96 + 96)) ** 0.5,
        "blocks1.0.conv1.weight": (1 / 64) ** 0.5,
        "blocks1.0.attn.weight": (1 / 25) ** 0.5,
        "blocks2.0.mlp.fc2.weight": (1 / 320) ** 0.5,
        "blocks3.0.attn.qkv.weight": (6 / (96 + 288)) ** 0.5,
        "stage1_output_decode.weight": (1 / 1024) ** 0.5,
    }
    for name, limit in limits.items():
        assert limit * 0.97 < state[name].abs().max() <= limit, name
    assert state["patch_embed3.proj.bias"].any()
    assert not state["patch_embed4.bias"].any()


RUN: dict[str, Any] = {
    "model": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "conv": {"dims": (8, 12), "depths": (1, 1), "mlp_ratio": 2.0},
        "patch_size": PATCH,
        "pixel_decoder": {"depth": 3, "embed_dim": 16, "num_heads": 4},
        "feature_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 2},
    },
    "data": {"shards": "shards"},
    "views": {"img_px": SIDE, "master_px": SIDE, "shift_px": 1},
    "heads": {"hidden_dim": 20, "out_dim": 12},
}


def build_model(**sections: Any) -> CMAE:
    run = {**RUN, **{name: {**RUN.get(name, {}), **section} for name, section in sections.items()}}
    model = build_cmae(CmaeConfig.model_validate(run))
    shake_(model)
    return model


def test_both_branches_are_hybrids_without_a_class_token(images: Tensor, rng: torch.Generator) -> None:
    model = build_model()
    noise = torch.rand(BATCH, 9, generator=rng)
    output = model(images, images, noise=noise)
    latents = model.online_encoder(images, output.mask)
    assert latents.shape == (BATCH, 12, 24)
    completed = model.pixel_decoder.completion(latents, output.mask).last
    assert completed.shape == (BATCH, GRID**2, 16)
    hidden = completed.gather(1, output.mask.hidden[:, :, None].expand(-1, -1, 16))
    expected = model.pixel_decoder.predict(model.pixel_decoder.norm(hidden))
    torch.testing.assert_close(output.pixels, expected)
    decoder = model.feature_decoder
    tokens = decoder.completion(latents, output.mask).last
    feature = decoder.head.predict(decoder.head.norm(tokens)).mean(dim=1)
    torch.testing.assert_close(output.query, model.predictor(model.projector(feature)), rtol=1e-4, atol=1e-4)
    everything = model.target_encoder(images, None)
    assert everything.shape == (BATCH, GRID**2, 24)
    torch.testing.assert_close(output.key, model.target_projector(everything.mean(dim=1)))


@pytest.mark.parametrize("feature_decoder", [{"depth": 0}, {"depth": 2, "shared": True}])
def test_the_other_feature_decoders_work_too(
    images: Tensor, rng: torch.Generator, feature_decoder: dict[str, Any]
) -> None:
    decoder = {"embed_dim": 16, "num_heads": 4, **feature_decoder}
    model = build_model(model={"feature_decoder": decoder})
    output = model(images, images, noise=torch.rand(BATCH, 9, generator=rng))
    latents = model.online_encoder(images, output.mask)
    if feature_decoder["depth"]:
        early = model.pixel_decoder(latents, output.mask).early
        feature = model.feature_decoder.predict(model.feature_decoder.norm(early)).mean(dim=1)
    else:
        feature = latents.mean(dim=1)
    torch.testing.assert_close(output.query, model.predictor(model.projector(feature)), rtol=1e-4, atol=1e-4)


def test_every_online_parameter_learns_and_no_target_one(images: Tensor, rng: torch.Generator) -> None:
    model = build_model()
    output = model(images, images, noise=torch.rand(BATCH, 9, generator=rng))
    (output.pixels.square().mean() + output.query.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is name.startswith("target_"), name
    followed = {pair.name for pair in model.target_pairs()}
    assert "target_encoder.stage1_output_decode.weight" in followed
    assert "target_encoder.norm.weight" not in followed


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"patch_size": 6}, "multiple of 4"),
        ({"encoder": "convvit_base"}, "drop embed_dim, depth, num_heads and conv"),
    ],
)
def test_a_hybrid_that_cannot_be_is_refused(model: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelConfig.model_validate({**RUN["model"], **model})


def test_a_hybrid_has_no_class_token_to_pool() -> None:
    with pytest.raises(ValueError, match="no class token"):
        CmaeConfig.model_validate({**RUN, "target": {"pool": "cls"}})


def as_pretrained(encoder: HybridEncoder) -> PretrainedEncoder:
    stages = ConvConfig(dims=STAGES.dims, depths=STAGES.depths, mlp_ratio=STAGES.mlp_ratio)
    model = ModelConfig(**SIZE._asdict(), mlp_ratio=2.0, patch_size=PATCH, conv=stages)
    views = ViewsConfig(img_px=SIDE, master_px=SIDE, shift_px=0)
    return online_encoder(encoder.state_dict(), model=model, views=views)


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def build_classifier(**options: Any) -> HybridClassifier:
    return HybridClassifier(SIZE, STAGES, patch_size=PATCH, grid=GRID, mlp_ratio=2.0, **options)


def test_a_classifier_starts_from_the_encoders_weights(
    images: Tensor, plain_stages: Callable[..., tuple[Tensor, ...]]
) -> None:
    encoder = build()
    classifier = build_network(as_pretrained(encoder), classes=5, has_new_norm=True)
    assert isinstance(classifier, HybridClassifier)
    classifier.init_head_()
    seen = torch.zeros(BATCH, GRID**2)
    fine, coarse, tokens = plain_stages(encoder.state_dict(), images, seen, heads=HEADS)
    pooled = nn.functional.layer_norm(tokens.mean(dim=1), (24,), eps=1e-6)
    torch.testing.assert_close(
        classifier.forward_head(classifier.forward_features(images), pre_logits=True),
        pooled,
        rtol=1e-5,
        atol=1e-5,
    )
    maps = classifier.forward_maps(images)
    torch.testing.assert_close(maps[0], fine, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[1], coarse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps[2].flatten(2).transpose(1, 2), tokens, rtol=1e-5, atol=1e-5)
    assert classifier(images).abs().max() < 1e-3
    assert classifier(images).shape == (BATCH, 5)


def test_frozen_features_are_the_pooled_tokens_of_pre_training(images: Tensor) -> None:
    encoder = build()
    network = build_network(as_pretrained(encoder))
    torch.testing.assert_close(network(images), encoder.pool(encoder(images, None)))


def test_positions_are_resized_to_another_grid(images: Tensor) -> None:
    network = build_network(as_pretrained(build()), img_px=2 * SIDE)
    assert network.pos_embed.shape == (1, (2 * GRID) ** 2, 24)
    assert network(torch.cat([images, images], dim=2).repeat(1, 1, 1, 2)).shape == (BATCH, 24)
    with pytest.raises(ConfigError, match="50 px is no multiple"):
        build_network(as_pretrained(build()), img_px=50)


def test_a_hybrid_without_class_token_cannot_pool_one() -> None:
    with pytest.raises(ConfigError, match='no class token: write "pool": "mean"'):
        build_network(as_pretrained(build()), pool="cls")


def test_random_weights_are_those_that_pre_training_starts_with() -> None:
    drawn = draw_weights(as_pretrained(build()), seed=5)
    fresh = HybridEncoder(SIZE, STAGES, patch_size=PATCH, grid=GRID, mlp_ratio=2.0)
    torch.manual_seed(5)
    init_transformer_(fresh)
    assert_same(drawn.state, fresh.state_dict())


def test_rematerialised_blocks_have_the_same_gradients(images: Tensor) -> None:
    classifier = build_classifier(num_classes=2)
    shake_(classifier)
    found = []
    for enable in (False, True):
        classifier.set_grad_checkpointing(enable)
        classifier.zero_grad()
        classifier(images).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in classifier.named_parameters()})
    assert_same(found[0], found[1])


def test_a_classifier_without_classes_gives_features(images: Tensor) -> None:
    assert build_classifier(num_classes=0)(images).shape == (BATCH, 24)


def test_drop_path_rises_over_all_blocks() -> None:
    classifier = build_classifier(num_classes=2, drop_path=0.4)
    rates = [module.drop_prob for module in classifier.modules() if isinstance(module, DropPath)]
    # the first block's rate is 0, so it has none; a transformer block has two
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.4, 0.4])


def test_timm_gives_the_layers_their_learning_rates() -> None:
    """Both convolutional stages are the stem. Source: Alpha-VL/ConvMAE util/lr_decay.py."""
    classifier = build_classifier(num_classes=2)
    groups = param_groups_layer_decay(classifier, 0.05, classifier.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(classifier.named_parameters())
    expected = {
        "pos_embed": 0.5**3,
        "patch_embed1.proj.weight": 0.5**3,
        "blocks1.1.attn.weight": 0.5**3,
        "blocks2.0.mlp.fc1.weight": 0.5**3,
        "patch_embed4.weight": 0.5**3,
        "blocks3.0.attn.qkv.weight": 0.5**2,
        "blocks3.1.attn.qkv.weight": 0.5,
        "fc_norm.weight": 1.0,
        "head.weight": 1.0,
    }
    assert {name: scale[id(named[name])] for name in expected} == pytest.approx(expected)
    assert decay[id(named["pos_embed"])] == 0.0
    assert decay[id(named["blocks1.0.attn.weight"])] == 0.05
