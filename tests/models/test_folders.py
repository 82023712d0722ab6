"""Round trips and what other libraries compute from the folders that are written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cmae_scale.config.cmae import CmaeConfig, ConvConfig, ModelConfig, ViewsConfig
from cmae_scale.core.errors import ConfigError
from cmae_scale.layers.tokens import patchify, take_tokens
from cmae_scale.losses import pixel_loss
from cmae_scale.models import build_cmae, read_description, read_encoder
from cmae_scale.models.formats import folders
from cmae_scale.models.formats.model_file import ModelFile, read_model_file
from cmae_scale.models.formats.programs import write_onnx, write_torch_export
from cmae_scale.models.formats.shapes import HeadCounts
from cmae_scale.models.weights import export_encoder

SIDE, PATCH, GRID = 24, 4, 6
MODEL = ModelConfig(embed_dim=24, depth=2, num_heads=3, mlp_ratio=3.0, patch_size=PATCH)
HYBRID = MODEL.model_copy(update={"conv": ConvConfig(dims=(8, 12), depths=(1, 2), mlp_ratio=2.0)})
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=rng)


def build_whole(model: ModelConfig = MODEL, *, weight: float = 1.0) -> tuple[CmaeConfig, Any]:
    """A whole model whose every tensor is random: positions, biases, norms."""
    cfg = CmaeConfig.model_validate(
        {
            "model": {
                **model.model_dump(),
                "pixel_decoder": {"depth": 2, "embed_dim": 16, "num_heads": 4},
                "feature_decoder": {"depth": 1, "embed_dim": 16, "num_heads": 2},
            },
            "data": {"shards": "none"},
            "views": {"img_px": SIDE, "master_px": SIDE, "shift_px": 1, "mean": (0.5, 0.4, 0.3)},
            "heads": {"hidden_dim": 20, "out_dim": 12},
            "loss": {"weight": weight},
        }
    )
    built = build_cmae(cfg)
    with torch.no_grad():
        for tensor in built.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.2 * torch.randn(tensor.shape))
    return cfg, built


def write_run(folder: Path, model: ModelConfig = MODEL) -> tuple[Any, ModelFile]:
    """An encoder folder as a run exports it, and the model it is from."""
    cfg, built = build_whole(model)
    export_encoder(built.online_encoder.state_dict(), folder, model=cfg.model, views=cfg.views)
    return built, read_model_file(folder)


def write_whole(folder: Path, model: ModelConfig = MODEL) -> tuple[Any, ModelFile]:
    """The same for a folder of the whole model."""
    cfg, built = build_whole(model)
    file = ModelFile(folder, "ours", built.state_dict(), cfg, cfg.views.mean, cfg.views.std, False, ())
    folders.write_whole(file, folder)
    return built, read_model_file(folder)


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def test_timm_to_ours_to_timm_changes_no_tensor(tmp_path: Path, images: Tensor) -> None:
    original = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, mlp_ratio=3.0, num_classes=0
    ).eval()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    file = read_model_file(tmp_path / "model.safetensors", heads=HeadCounts(encoder=3))
    folders.write_encoder(file, tmp_path / "ours")
    ours = read_encoder(tmp_path / "ours")
    torch.testing.assert_close(ours(images, None), original.forward_features(images), **CLOSE)
    folders.write_timm(read_model_file(tmp_path / "ours"), tmp_path / "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    assert_same(back.state_dict(), original.state_dict())


def test_a_timm_classifier_of_the_class_token_goes_round(tmp_path: Path, images: Tensor) -> None:
    original = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, mlp_ratio=3.0, num_classes=7
    ).eval()
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    file = read_model_file(tmp_path / "model.safetensors", heads=HeadCounts(encoder=3))
    folders.write_timm(file, tmp_path / "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert_same(back.state_dict(), original.state_dict())
    torch.testing.assert_close(back(images), original(images))


def test_a_classifier_keeps_the_names_of_its_classes(tmp_path: Path, published: Any) -> None:
    torch.save({"model": published.make_mae(classes=5)}, tmp_path / "tuned.pth")
    file = read_model_file(tmp_path / "tuned.pth", heads=HeadCounts(encoder=3))
    names = ("cat", "dog", "owl", "bee", "ant")
    folders.write_classifier(replace(file, class_names=names), tmp_path / "named")
    folders.write_timm(read_model_file(tmp_path / "named"), tmp_path / "again")
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert (
        tuple(again.pretrained_cfg["label_names"])
        == read_description(tmp_path / "again").class_names
        == names
    )


def test_ours_to_hugging_face_to_ours_changes_no_tensor(tmp_path: Path) -> None:
    model, file = write_run(tmp_path / "ours")
    folders.write_huggingface(file, tmp_path / "hf")
    back = read_model_file(tmp_path / "hf")
    assert back.layout == "huggingface"
    folders.write_encoder(back, tmp_path / "back")
    assert_same(read_encoder(tmp_path / "back").state_dict(), model.online_encoder.state_dict())


def test_hugging_face_computes_the_same_features(tmp_path: Path, images: Tensor) -> None:
    pytest.importorskip("transformers")
    from transformers import ViTModel

    _, file = write_run(tmp_path / "ours")
    folders.write_huggingface(file, tmp_path / "hf")
    theirs, report = ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = read_encoder(tmp_path / "ours")(images, None)
    torch.testing.assert_close(theirs.eval()(images).last_hidden_state, expected, **CLOSE)


def test_hugging_face_prepares_images_with_the_runs_moments(tmp_path: Path) -> None:
    _, file = write_run(tmp_path / "ours")
    folders.write_huggingface(file, tmp_path / "hf")
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5, 0.4, 0.3]
    assert processor["size"] == {"height": SIDE, "width": SIDE}
    assert read_model_file(tmp_path / "hf").mean == (0.5, 0.4, 0.3)


def test_a_hugging_face_mae_gives_the_same_loss(tmp_path: Path, images: Tensor, rng: torch.Generator) -> None:
    pytest.importorskip("transformers")
    from transformers import ViTMAEForPreTraining

    model, file = write_whole(tmp_path / "ours")
    folders.write_huggingface_mae(file, tmp_path / "hf")
    theirs, report = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    noise = torch.rand(3, GRID**2, generator=rng)
    with torch.no_grad():
        expected = theirs.eval()(images, noise=noise).loss
    model.mask_config = model.mask_config.model_copy(update={"cell": 1, "ratio": 0.75})
    output = model(images, None, noise=noise)
    ours = pixel_loss(output.pixels, take_tokens(patchify(images, PATCH), output.mask.hidden))
    torch.testing.assert_close(ours, expected, **CLOSE)


@pytest.mark.parametrize("short", [False, True], ids=["names of files", "names of transformers 5"])
def test_a_hugging_face_mae_is_read_tensor_for_tensor(tmp_path: Path, short: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import ViTMAEForPreTraining

    model, file = write_whole(tmp_path / "ours")
    folders.write_huggingface_mae(file, tmp_path / "hf")
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    if short:
        save_file(theirs.state_dict(), tmp_path / "again" / "model.safetensors")
    assert ("vit.encoder.layer.0" in " ".join(load_file(tmp_path / "again" / "model.safetensors"))) != short
    back = read_model_file(tmp_path / "again")
    assert back.parts == ["online_encoder", "pixel_decoder"]
    assert_same(back.tensors, {n: t for n, t in model.state_dict().items() if n.split(".")[0] in back.parts})


@pytest.mark.parametrize("kind", ["model", "classifier"])
def test_hugging_faces_own_models_are_read_without_their_ends(
    tmp_path: Path, images: Tensor, kind: str
) -> None:
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 72}
    config = ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6)
    theirs = (ViTModel if kind == "model" else ViTForImageClassification)(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    file = read_model_file(tmp_path / "hf")
    assert any("left out" in notice for notice in file.notices)
    folders.write_encoder(file, tmp_path / "ours")
    body = theirs if kind == "model" else theirs.vit
    expected = body(images).last_hidden_state
    torch.testing.assert_close(read_encoder(tmp_path / "ours")(images, None), expected, **CLOSE)


def test_other_arithmetic_is_told_or_refused(tmp_path: Path) -> None:
    _, file = write_run(tmp_path / "ours")
    folders.write_huggingface(file, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-12}))
    assert read_model_file(tmp_path / "hf").notices == ("its norms add 1e-12 to the variance, ours 1e-06",)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "hidden_act": "quick_gelu"}))
    with pytest.raises(ConfigError, match='has the activation "quick_gelu"'):
        read_model_file(tmp_path / "hf")


@pytest.mark.parametrize("model", [MODEL, HYBRID], ids=["plain", "hybrid"])
def test_a_whole_model_is_read_back_with_all_its_settings(tmp_path: Path, model: ModelConfig) -> None:
    built, file = write_whole(tmp_path / "whole", model)
    assert_same(file.tensors, built.state_dict())
    assert file.cfg.model.feature_decoder.num_heads == 2
    assert file.notices == ()


def test_a_named_size_is_named_in_the_folder() -> None:
    spelt = ModelConfig(embed_dim=768, depth=11, num_heads=12, conv=ConvConfig())
    assert folders._named(spelt).encoder == "convvit_base"
    assert folders._named(MODEL) == MODEL


def test_an_encoder_without_its_final_norm_is_read_back(
    tmp_path: Path, published: Any, images: Tensor
) -> None:
    """The encoder of a fine-tuned model, also through timm."""
    torch.save({"model": published.make_mae(classes=5)}, tmp_path / "tuned.pth")
    file = read_model_file(tmp_path / "tuned.pth", heads=HeadCounts(encoder=3))
    folders.write_encoder(file, tmp_path / "ours")
    tokens = read_encoder(tmp_path / "ours")(images, None)
    expected = published.encode_vit(published.make_mae(classes=5), images, torch.zeros(3, GRID**2))
    torch.testing.assert_close(tokens, expected, **CLOSE)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(theirs.forward_features(images), expected, **CLOSE)


@pytest.mark.slow_unless(model=MODEL)
@pytest.mark.parametrize("model", [MODEL, HYBRID], ids=["plain", "hybrid"])
def test_onnx_runtime_computes_the_same_tokens_for_any_batch(
    tmp_path: Path, images: Tensor, model: ModelConfig
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, file = write_run(tmp_path / "ours", model)
    write_onnx(file, tmp_path / "encoder.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "ours"]
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"))
    encoder = read_encoder(tmp_path / "ours")
    for batch in (images[:1], images):
        (tokens,) = session.run(["tokens"], {"images": batch.numpy()})
        expected = encoder(batch, None).detach()
        torch.testing.assert_close(torch.from_numpy(tokens), expected, **CLOSE)


@pytest.mark.slow_unless(model=MODEL)
@pytest.mark.parametrize("model", [MODEL, HYBRID], ids=["plain", "hybrid"])
def test_an_exported_program_computes_the_same_tokens_for_any_batch(
    tmp_path: Path, images: Tensor, model: ModelConfig
) -> None:
    _, file = write_run(tmp_path / "ours", model)
    write_torch_export(file, tmp_path / "encoder.pt2")
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    encoder = read_encoder(tmp_path / "ours")
    for batch in (images[:1], images):
        torch.testing.assert_close(program(batch), encoder(batch, None), **CLOSE)


@pytest.mark.parametrize(
    "write", [folders.write_timm, folders.write_huggingface, folders.write_huggingface_mae]
)
def test_a_hybrid_is_refused_where_there_is_none(tmp_path: Path, write: Any) -> None:
    _, file = write_run(tmp_path / "ours", HYBRID)
    with pytest.raises(ConfigError, match="is a hybrid encoder, which"):
        write(file, tmp_path / "out")


def test_what_a_format_needs_is_said(tmp_path: Path, published: Any) -> None:
    _, file = write_run(tmp_path / "ours")
    with pytest.raises(ConfigError, match="needs a pixel decoder"):
        folders.write_huggingface_mae(file, tmp_path / "out")
    for kind, make in (("vit", published.make_mae), ("hybrid", published.make_convmae)):
        torch.save(make(classes=5), tmp_path / f"{kind}.pth")
    heads = HeadCounts(encoder=3)
    with pytest.raises(ConfigError, match="a fine-tuned model and a target branch lack"):
        folders.write_huggingface(read_model_file(tmp_path / "vit.pth", heads=heads), tmp_path / "out")
    with pytest.raises(ConfigError, match="has no classifier"):
        folders.write_classifier(file, tmp_path / "out")
    with pytest.raises(ConfigError, match="is a fine-tuned hybrid"):
        folders.write_encoder(read_model_file(tmp_path / "hybrid.pth", heads=heads), tmp_path / "out")


def test_views_of_other_moments_are_kept(tmp_path: Path) -> None:
    views = ViewsConfig(img_px=SIDE, master_px=SIDE, shift_px=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    _, built = build_whole()
    export_encoder(built.online_encoder.state_dict(), tmp_path, model=MODEL, views=views)
    file = read_model_file(tmp_path)
    assert (file.mean, file.std) == (views.mean, views.std)
