"""Encoders from folders and from timm, and the classifiers that are built on them."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from cmae_scale.config.cmae import ModelConfig, ViewsConfig
from cmae_scale.config.sizes import read_size
from cmae_scale.config.transfer import CropConfig, FinetuneConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.models.build import init_transformer_
from cmae_scale.models.classifier import LinearProbe, build_classifier, export_classifier, fold_probe
from cmae_scale.models.encoder import Encoder
from cmae_scale.models.networks import build_network, draw_weights
from cmae_scale.models.pretrained import open_encoder
from cmae_scale.models.weights import export_encoder

MODEL = ModelConfig(embed_dim=24, depth=3, num_heads=2, patch_size=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    encoder = Encoder(read_size(MODEL), patch_size=4, grid=4)
    init_transformer_(encoder)
    for parameter in encoder.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    export_encoder(
        encoder.state_dict(), tmp_path, model=MODEL, views=ViewsConfig(img_px=16, master_px=20, shift_px=5)
    )
    return tmp_path


def test_a_folders_features_are_those_timm_gives(folder: Path, rng: torch.Generator) -> None:
    images = torch.randn(2, 3, 16, 16, generator=rng)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    for place in (str(folder), f"local-dir:{folder}"):
        ours = build_network(open_encoder(place), img_px=16).eval()
        torch.testing.assert_close(ours(images), theirs(images))
    cls = build_network(open_encoder(str(folder)), img_px=16, pool="cls").eval()
    torch.testing.assert_close(cls(images), theirs.forward_features(images)[:, 0])


def test_positions_are_resized_as_timm_resizes_them(folder: Path) -> None:
    ours = build_network(open_encoder(str(folder)), img_px=32)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=32)
    assert ours.pos_embed.shape[1] == 65
    torch.testing.assert_close(ours.pos_embed, theirs.pos_embed)


def test_a_random_encoder_has_the_same_shape_and_other_weights(folder: Path) -> None:
    trained = open_encoder(str(folder))
    random, again = (draw_weights(open_encoder(str(folder), with_weights=False), seed=7) for _ in range(2))
    assert {n: v.shape for n, v in random.state.items()} == {n: v.shape for n, v in trained.state.items()}
    assert all(torch.equal(again.state[name], value) for name, value in random.state.items())
    assert not torch.equal(
        random.state["blocks.0.attn.qkv.weight"], trained.state["blocks.0.attn.qkv.weight"]
    )
    torch.testing.assert_close(random.state["pos_embed"], trained.state["pos_embed"])


def test_timms_own_names_can_be_opened_without_weights() -> None:
    encoder = open_encoder("timm:vit_tiny_patch16_224", with_weights=False)
    assert build_network(encoder, img_px=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 192)
    with pytest.raises(ConfigError, match="give a vision transformer"):
        open_encoder("timm:resnet18", with_weights=False)
    with pytest.raises(ConfigError, match="cannot be opened"):
        open_encoder("timm:vit_of_nobody", with_weights=False)


def test_a_damaged_folder_is_told(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["depth"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="another network than its config"):
        build_network(open_encoder(str(folder)), img_px=16)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="no encoder at"):
        open_encoder(str(folder))


def test_layer_decay_is_the_rate_to_the_power_of_the_layers_above(folder: Path) -> None:
    cfg = FinetuneConfig(layer_decay=0.65)
    model = build_classifier(open_encoder(str(folder)), cfg, img_px=16, classes=3, seed=0)
    groups = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65
    )
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = {
            "blocks": lambda n: int(n.split(".")[1]) + 1,
            "fc_norm": lambda n: 4,
            "head": lambda n: 4,
        }.get(name.split(".")[0], lambda n: 0)(name)
        assert of[id(parameter)]["lr_scale"] == pytest.approx(0.65 ** (3 + 1 - layer)), name
        exempt = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert of[id(parameter)]["weight_decay"] == (0.0 if exempt else 0.05), name


@pytest.mark.parametrize("blocks", [0, 1, 3, None])
def test_only_the_last_blocks_and_what_follows_are_trained(folder: Path, blocks: int | None) -> None:
    cfg = FinetuneConfig(blocks=blocks)
    model = build_classifier(open_encoder(str(folder)), cfg, img_px=16, classes=3, seed=0)
    trained = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    named = {f"blocks.{number}" for number in range(3)} & {".".join(name.split(".")[:2]) for name in trained}
    assert len(named) == (3 if blocks is None else blocks)
    if blocks:
        assert "blocks.2" in named
    assert ("patch_embed.proj" in trained) == (blocks is None)
    assert {"fc_norm", "head"} <= trained


def test_a_fine_tuned_head_starts_near_zero_on_a_fresh_norm(folder: Path) -> None:
    model = build_classifier(open_encoder(str(folder)), FinetuneConfig(), img_px=16, classes=3, seed=0)
    assert isinstance(model.norm, torch.nn.Identity)
    assert torch.equal(model.fc_norm.weight, torch.ones(24))
    assert 0 < float(model.head.weight.abs().max()) < 1e-3
    assert float(model.head.bias.abs().max()) == 0


def test_a_folded_probe_is_the_probe(folder: Path, tmp_path: Path, rng: torch.Generator) -> None:
    encoder = open_encoder(str(folder))
    probe = LinearProbe(build_network(encoder, img_px=16, pool="cls"), classes=3, heads=2, seed=0)
    images = torch.randn(8, 3, 16, 16, generator=rng)
    probe.train()
    for _ in range(50):
        probe(images)
    probe.heads[1].weight.data.normal_(generator=rng)  # type: ignore[union-attr, operator]
    probe.eval()
    export_classifier(
        fold_probe(probe.state_dict(), head=1),
        tmp_path / "model",
        encoder=encoder,
        pool="cls",
        has_new_norm=False,
        classes=("a", "b", "c"),
        crop=CropConfig(img_px=16),
        mean=encoder.mean,
        std=encoder.std,
    )
    timms = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(timms(images), probe(images)[:, 1], rtol=1e-3, atol=1e-4)
    assert timms.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_an_exported_encoder_is_fine_tuned_by_timms_own_means(folder: Path, rng: torch.Generator) -> None:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2, drop_path_rate=0.1)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.75)
    optimizer = torch.optim.AdamW([{**g, "lr": 3e-3 * g["lr_scale"]} for g in groups])
    labels = torch.arange(16) % 2
    images = torch.randn(16, 3, 16, 16, generator=rng) + labels[:, None, None, None]
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
