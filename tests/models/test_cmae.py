from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmae_scale.config.cmae import CmaeConfig
from cmae_scale.layers.tokens import patchify, take_tokens
from cmae_scale.losses import byol, infonce, pixel_loss
from cmae_scale.models import CMAE, CMAEOutput, build_cmae

BATCH, SIDE, PATCH, GRID = 4, 24, 4, 6
TINY: dict[str, Any] = {
    "model": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "patch_size": PATCH,
        "pixel_decoder": {"depth": 3, "embed_dim": 16, "num_heads": 4, "mlp_ratio": 2.0},
        "feature_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2.0},
    },
    "data": {"shards": "shards"},
    "views": {"img_px": SIDE, "master_px": SIDE + 3, "shift_px": 4},
    "heads": {"hidden_dim": 20, "out_dim": 12},
}


def settings(**changes: Any) -> CmaeConfig:
    """The tiny run with changed settings, named as `section__setting` or `section__part__setting`."""
    run: dict[str, Any] = {name: dict(section) for name, section in TINY.items()}
    for path, value in changes.items():
        *sections, name = path.split("__")
        place = run
        for section in sections:
            place[section] = dict(place.get(section, {}))
            place = place[section]
        place[name] = value
    return CmaeConfig.model_validate(run)


@pytest.fixture
def views(rng: torch.Generator) -> tuple[Tensor, Tensor]:
    online, target = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=rng)
    return online, target


@pytest.fixture
def noise(rng: torch.Generator) -> Tensor:
    return torch.rand(BATCH, 9, generator=rng)


def shake_(model: nn.Module) -> None:
    """Move every parameter off its starting value, so that no bias is zero and no norm the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def total_loss(model: CMAE, output: CMAEOutput, online: Tensor) -> Tensor:
    assert output.pixels is not None
    assert output.mask is not None
    patches = take_tokens(patchify(online, PATCH), output.mask.hidden)
    total = pixel_loss(output.pixels, patches)
    if output.query is not None and output.key is not None:
        total = total + infonce(output.query, output.key, first_row=0, temperature=0.07)
    return total


class PlainCMAE:
    """The paper's forward pass on a state_dict: no modules, no masks as indices, one image at a time."""

    def __init__(
        self, state: Mapping[str, Tensor], *, pixel_heads: int, feature_heads: int, heads: int
    ) -> None:
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.heads = {"online_encoder": heads, "target_encoder": heads}
        self.heads |= {"pixel_decoder.completion": pixel_heads, "feature_decoder.completion": feature_heads}

    def linear(self, name: str, tokens: Tensor) -> Tensor:
        bias = self.state.get(f"{name}.bias", torch.zeros(()))
        return tokens @ self.state[f"{name}.weight"].T + bias

    def layer_norm(self, name: str, tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name: str, tokens: Tensor, heads: int) -> Tensor:
        query, key, value = self.linear(f"{name}.qkv", tokens).chunk(3, dim=-1)
        outputs = []
        for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
            weights = (q @ k.T / q.shape[1] ** 0.5).exp()
            outputs.append(weights / weights.sum(dim=1, keepdim=True) @ v)
        return self.linear(f"{name}.proj", torch.cat(outputs, dim=-1))

    def blocks(self, name: str, tokens: Tensor) -> Tensor:
        depth = 0
        while f"{name}.blocks.{depth}.norm1.weight" in self.state:
            block = f"{name}.blocks.{depth}"
            tokens = tokens + self.attention(
                f"{block}.attn", self.layer_norm(f"{block}.norm1", tokens), self.heads[name]
            )
            wide = self.linear(f"{block}.mlp.fc1", self.layer_norm(f"{block}.norm2", tokens))
            wide = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
            tokens = tokens + self.linear(f"{block}.mlp.fc2", wide)
            depth += 1
        return tokens

    def encode(self, name: str, image: Tensor, kept: list[int]) -> Tensor:
        kernel, bias = (
            self.state[f"{name}.patch_embed.proj.weight"],
            self.state[f"{name}.patch_embed.proj.bias"],
        )
        position = self.state[f"{name}.pos_embed"][0]
        tokens = [self.state[f"{name}.cls_token"][0, 0] + position[0]]
        for patch in kept:
            top, left = patch // GRID * PATCH, patch % GRID * PATCH
            window = image[:, top : top + PATCH, left : left + PATCH]
            tokens.append((kernel * window).sum(dim=(1, 2, 3)) + bias + position[1 + patch])
        return self.blocks(name, torch.stack(tokens))

    def decode(self, name: str, latents: Tensor, kept: list[int]) -> Tensor:
        completion = f"{name}.completion"
        visible = self.linear(f"{completion}.narrow", latents)
        mask_token = self.state[f"{completion}.mask_token"][0, 0]
        places = dict(zip(kept, visible[1:], strict=True))
        patches = [places.get(patch, mask_token) for patch in range(GRID * GRID)]
        tokens = torch.stack([visible[0], *patches]) + self.state[f"{completion}.pos_embed"][0]
        return self.blocks(completion, tokens)[1:]

    def head(self, name: str, rows: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.fc1", rows)
        normed = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-6).sqrt()
        normed = normed * self.state[f"{name}.norm.weight"] + self.state[f"{name}.norm.bias"]
        return self.linear(f"{name}.fc2", normed.clamp(min=0))

    def forward(self, online: Tensor, target: Tensor, kept: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        pixels, features, target_features = [], [], []
        for image, target_image, visible in zip(online.double(), target.double(), kept, strict=True):
            latents = self.layer_norm("online_encoder.norm", self.encode("online_encoder", image, visible))
            hidden = [patch for patch in range(GRID * GRID) if patch not in visible]
            decoded = self.decode("pixel_decoder", latents, visible)[hidden]
            pixels.append(
                self.linear("pixel_decoder.predict", self.layer_norm("pixel_decoder.norm", decoded))
            )
            completed = self.layer_norm(
                "feature_decoder.head.norm", self.decode("feature_decoder", latents, visible)
            )
            features.append(self.linear("feature_decoder.head.predict", completed).mean(dim=0))
            everything = self.encode("target_encoder", target_image, list(range(GRID * GRID)))
            target_features.append(everything[1:].mean(dim=0))
        query = self.head("predictor", self.head("projector", torch.stack(features)))
        return torch.stack(pixels), query, self.head("target_projector", torch.stack(target_features))


def test_forward_equals_the_paper_computed_plainly(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings())
    shake_(model)
    output = model(*views, noise=noise)
    plain = PlainCMAE(model.state_dict(), heads=3, pixel_heads=4, feature_heads=2)
    pixels, query, key = plain.forward(*views, output.mask.kept.tolist())
    for name, ours, expected in (
        ("pixels", output.pixels, pixels),
        ("query", output.query, query),
        ("key", output.key, key),
    ):
        torch.testing.assert_close(
            ours.double(), expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_lowest_noise_is_kept(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    mask = build_cmae(settings())(*views, noise=noise).mask
    lowest = noise.argsort(dim=1)[:, :3]  # int(9 * 0.35) cells of 2 x 2
    for kept, cells in zip(mask.kept, lowest, strict=True):
        assert set((kept // GRID // 2 * 3 + kept % GRID // 2).tolist()) == set(cells.tolist())


def test_without_noise_masks_differ_and_follow_torchs_generator(views: tuple[Tensor, Tensor]) -> None:
    model = build_cmae(settings())
    first, second = model(*views).mask.kept, model(*views).mask.kept
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    once = model(*views).mask.kept
    torch.manual_seed(3)
    assert torch.equal(model(*views).mask.kept, once)


def test_either_view_may_be_left_out(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings())
    online, target = views
    both = model(online, target, noise=noise)
    online_alone, target_alone = model(online, None, noise=noise), model(None, target)
    assert target_alone[:2] == (None, None)
    assert target_alone.mask is None
    assert online_alone.key is None
    assert torch.equal(online_alone.pixels, both.pixels)
    assert torch.equal(online_alone.query, both.query)
    assert torch.equal(target_alone.key, both.key)


def test_the_target_branch_records_no_graph_even_for_views_with_gradient(
    views: tuple[Tensor, Tensor],
) -> None:
    assert not build_cmae(settings())(None, views[1].requires_grad_()).key.requires_grad


def test_gradients_reach_the_online_branch_and_nothing_else(
    views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    model = build_cmae(settings())
    output = model(*views, noise=noise)
    assert not output.key.requires_grad
    total_loss(model, output, views[0]).backward()
    for name, parameter in model.named_parameters():
        is_target = name.startswith("target_")
        assert parameter.requires_grad is not is_target, name
        assert (parameter.grad is None) is is_target, name
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("pixels", {"online_encoder", "pixel_decoder"}),
        ("query", {"online_encoder", "feature_decoder", "projector", "predictor"}),
    ],
)
def test_each_loss_trains_its_own_path(
    views: tuple[Tensor, Tensor], noise: Tensor, part: str, trained: set[str]
) -> None:
    model = build_cmae(settings())
    getattr(model(*views, noise=noise), part).square().sum().backward()
    reached = {
        name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    assert reached == trained


def test_feature_depth_zero_pools_the_visible_tokens(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings(model__feature_decoder__depth=0))
    assert model.feature_decoder is None
    output = model(*views, noise=noise)
    feature = model.online_encoder(views[0], output.mask)[:, 1:].mean(dim=1)
    torch.testing.assert_close(output.query, model.predictor(model.projector(feature)))


def test_a_shared_feature_decoder_reads_the_pixel_decoders_first_blocks(
    views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    model = build_cmae(settings(model__feature_decoder__shared=True))
    assert {name.split(".")[0] for name, _ in model.feature_decoder.named_parameters()} == {"norm", "predict"}
    output = model(*views, noise=noise)
    completion = model.pixel_decoder.completion
    del completion.blocks[2]  # what is left are the two shared ones
    tokens = completion(model.online_encoder(views[0], output.mask), output.mask).last
    head = model.feature_decoder
    feature = head.predict(head.norm(tokens[:, 1:])).mean(dim=1)
    torch.testing.assert_close(output.query, model.predictor(model.projector(feature)))


def test_a_shared_feature_decoder_trains_only_the_shared_blocks(
    views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    model = build_cmae(settings(model__feature_decoder__shared=True))
    model(*views, noise=noise).query.square().sum().backward()
    completion = model.pixel_decoder.completion
    reached = [block.attn.qkv.weight.grad is not None for block in completion.blocks]
    assert reached == [True, True, False]
    assert completion.mask_token.grad is not None


def test_the_target_may_be_masked_too(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings(target__mask_ratio=0.5))
    key = model(None, views[1], target_noise=noise).key
    kept = noise.argsort(dim=1)[:, :4]
    seen = torch.zeros(BATCH, 9).scatter(1, kept, 1.0).view(BATCH, 1, 3, 3)
    seen = seen.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    assert torch.equal(model(None, views[1] * seen, target_noise=noise).key, key)
    assert not torch.equal(model(None, views[1] * (1 - seen), target_noise=noise).key, key)


def test_a_final_norm_of_the_target_follows_the_online_one(views: tuple[Tensor, Tensor]) -> None:
    model = build_cmae(settings(target__final_norm=True))
    assert "target_encoder.norm.weight" in {pair.name for pair in model.target_pairs()}
    encoded = model.online_encoder(views[1], None)[:, 1:].mean(dim=1)
    torch.testing.assert_close(model(None, views[1]).key, model.projector(encoded))


def test_the_target_may_be_pooled_by_its_class_token(views: tuple[Tensor, Tensor]) -> None:
    model = build_cmae(settings(target__pool="cls"))
    encoded = model.target_encoder(views[1], None)[:, 0]
    torch.testing.assert_close(model(None, views[1]).key, model.target_projector(encoded))


def test_layer_norm_heads_make_every_image_independent(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings(heads__norm="layer"))
    whole = model(*views, noise=noise)
    first = model(views[0][:1], views[1][:1], noise=noise[:1])
    torch.testing.assert_close(first.query, whole.query[:1])
    torch.testing.assert_close(first.key, whole.key[:1])


def test_batch_norm_of_the_target_uses_the_targets_own_batch(views: tuple[Tensor, Tensor]) -> None:
    model = build_cmae(settings())
    whole, half = model(None, views[1]).key, model(None, views[1][:2]).key
    assert not torch.allclose(whole[:2], half)
    assert model.target_projector.norm.num_batches_tracked.item() == 2
    assert model.projector.norm.num_batches_tracked.item() == 0


def test_byol_trains_the_same_parameters(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    model = build_cmae(settings(loss__contrast="byol"))
    output = model(*views, noise=noise)
    byol(output.query, output.key).backward()
    assert model.predictor.fc2.weight.grad.any()
    assert model.online_encoder.cls_token.grad.any()


def test_weight_zero_is_a_plain_mae(views: tuple[Tensor, Tensor], noise: Tensor) -> None:
    mae, cmae = build_cmae(settings(loss__weight=0.0)), build_cmae(settings())
    assert {name.split(".")[0] for name, _ in mae.named_parameters()} == {"online_encoder", "pixel_decoder"}
    assert mae.target_pairs() == []
    mae.load_state_dict({name: cmae.state_dict()[name] for name in mae.state_dict()})
    output = mae(*views, noise=noise)
    assert output.query is None
    assert output.key is None
    assert torch.equal(output.pixels, cmae(*views, noise=noise).pixels)
    total_loss(mae, output, views[0]).backward()
    assert all(parameter.grad is not None for parameter in mae.parameters())


def test_shared_blocks_cost_a_plain_mae_nothing() -> None:
    model = build_cmae(settings(loss__weight=0.0, model__feature_decoder__shared=True))
    assert model.pixel_decoder.completion.early_depth == 0


def test_the_target_starts_as_a_copy_and_is_paired_by_name() -> None:
    model = build_cmae(settings())
    pairs = model.target_pairs()
    named = dict(model.named_parameters())
    assert [pair.name for pair in pairs] == [name for name in named if name.startswith("target_")]
    for pair in pairs:
        online = pair.name.replace("target_encoder", "online_encoder").replace(
            "target_projector", "projector"
        )
        assert pair.target is named[pair.name]
        assert pair.online is named[online]
        assert torch.equal(pair.target, pair.online)


def test_no_parameter_is_left_without_a_starting_value() -> None:
    for model in (build_cmae(settings()), build_cmae(settings(heads__norm="layer", target__final_norm=True))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        model.init_()
        assert [name for name, parameter in model.named_parameters() if parameter.isnan().any()] == []


def test_starting_values_are_those_of_mae() -> None:
    model = build_cmae(settings(model__embed_dim=96))
    state = model.state_dict()
    limits = {
        "online_encoder.patch_embed.proj.weight": (6 / (48 + 96)) ** 0.5,
        "online_encoder.blocks.0.attn.qkv.weight": (6 / (96 + 3 * 96)) ** 0.5,
        "pixel_decoder.completion.narrow.weight": (6 / (96 + 16)) ** 0.5,
        "projector.fc1.weight": (1 / 96) ** 0.5,
    }
    for name, limit in limits.items():
        assert limit * 0.98 < state[name].abs().max() <= limit, name
    assert not state["online_encoder.blocks.0.attn.qkv.bias"].any()
    assert state["online_encoder.patch_embed.proj.bias"].any()
    assert state["projector.fc1.bias"].any()
    for token in (model.online_encoder.cls_token, model.pixel_decoder.completion.mask_token):
        assert 0 < token.std() < 0.04


def test_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_cmae(settings()).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build_cmae(settings()).state_dict(), build_cmae(settings(seed=1)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["online_encoder.cls_token"], other["online_encoder.cls_token"])


@pytest.mark.parametrize("shared", [False, True])
def test_rematerialised_blocks_change_neither_losses_nor_gradients(
    views: tuple[Tensor, Tensor], noise: Tensor, shared: bool
) -> None:
    model = build_cmae(settings(model__feature_decoder__shared=shared))
    run: list[nn.Module] = []

    def recompute(block: nn.Module, tokens: Tensor) -> Any:
        run.append(block)
        return checkpoint(block, tokens, use_reentrant=False)

    results = []
    for runner in (None, recompute):
        model.set_remat_(runner)
        model.zero_grad()
        loss = total_loss(model, model(*views, noise=noise), views[0])
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))
    assert len(run) == 2 + 3 + (0 if shared else 2)  # encoder, pixel decoder, feature decoder; no target
    model.set_remat_(None)
    run.clear()
    model(*views, noise=noise)
    assert run == []


def test_autocast_and_low_precision_parameters_stay_near_full_precision(
    views: tuple[Tensor, Tensor], noise: Tensor
) -> None:
    model = build_cmae(settings(heads__norm="layer"))  # batch norm of so few images magnifies rounding
    full = model(*views, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*views, noise=noise)
    for parameter in model.parameters():  # what DeepSpeed's bf16 engine does
        parameter.data = parameter.data.bfloat16()
    low = model(*views, noise=noise)
    for output in (mixed, low):
        for ours, expected in zip(output[:3], full[:3], strict=True):
            assert (ours.float() - expected).norm() < 0.05 * expected.norm()
