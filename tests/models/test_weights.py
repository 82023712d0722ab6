import contextlib
import json
import random
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cmae_scale.config.cmae import ConvConfig, EncoderName, ModelConfig, ViewsConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.core.errors import ConfigError
from cmae_scale.models import ImageEncoder, build, read_description, read_encoder
from cmae_scale.models.build import init_transformer_
from cmae_scale.models.weights import describe_encoder, export_encoder, read_weights

TINY = ModelConfig(embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, patch_size=4)


def build_encoder(model: ModelConfig, views: ViewsConfig) -> ImageEncoder:
    encoder = build.build_encoder(model, img_px=views.img_px)
    init_transformer_(encoder)
    return encoder


@pytest.mark.parametrize(
    ("model", "img_px"),
    [(TINY, 24), (TINY.model_copy(update={"patch_size": 8}), 40), (ModelConfig(encoder="vit_tiny"), 224)],
    ids=["24 px in patches of 4", "40 px in patches of 8", "ViT-Ti"],
)
def test_timm_loads_an_export_to_the_same_features(
    rng: torch.Generator, tmp_path: Path, model: ModelConfig, img_px: int
) -> None:
    views = ViewsConfig(
        img_px=img_px, master_px=img_px + 3, shift_px=4, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1)
    )
    encoder = build_encoder(model, views)
    export_encoder(encoder.state_dict(), tmp_path, model=model, views=views)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, img_px, img_px, generator=rng)
    tokens = encoder(images, None)
    torch.testing.assert_close(loaded.forward_features(images), tokens)
    torch.testing.assert_close(loaded(images), tokens[:, 1:].mean(dim=1))
    prepared = timm.data.resolve_data_config(model=loaded)
    assert tuple(prepared["input_size"]) == (3, img_px, img_px)
    assert tuple(prepared["mean"]) == views.mean
    assert tuple(prepared["std"]) == views.std


def test_a_classifier_can_be_put_on_an_export(tmp_path: Path) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1)
    export_encoder(build_encoder(TINY, views).state_dict(), tmp_path, model=TINY, views=views)
    classifier = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert classifier(torch.zeros(2, 3, 24, 24)).shape == (2, 7)


HYBRID = TINY.model_copy(update={"conv": ConvConfig(dims=(8, 12), depths=(1, 2), mlp_ratio=3.0)})


@pytest.mark.parametrize("model", [TINY, HYBRID], ids=["plain", "hybrid"])
def test_an_export_is_read_back_to_the_same_encoder(
    rng: torch.Generator, tmp_path: Path, model: ModelConfig
) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))
    encoder = build_encoder(model, views)
    export_encoder(encoder.state_dict(), tmp_path, model=model, views=views)
    loaded, about = read_encoder(tmp_path), read_description(tmp_path)
    images = torch.randn(2, 3, 24, 24, generator=rng)
    assert not loaded.training
    assert torch.equal(loaded(images, None), encoder(images, None))
    assert (about.img_px, about.mean, about.std) == (24, views.mean, views.std)
    assert (about.model.embed_dim, about.model.conv) == (model.embed_dim, model.conv)
    assert about.architecture == ("convvit" if model.is_hybrid else "vit_base_patch16_224")


@pytest.mark.parametrize("name", ["convvit_small", "convvit_base", "convvit_large"])
def test_a_named_hybrid_is_described_by_its_name_and_its_sizes(name: EncoderName) -> None:
    about = describe_encoder(ModelConfig(encoder=name), views=ViewsConfig())
    assert about["architecture"] == name
    args = json.loads(json.dumps(about["model_args"]))
    spelt = ModelConfig.model_validate_json(json.dumps({k: v for k, v in args.items() if k != "img_size"}))
    named = ModelConfig(encoder=name)
    assert (read_size(spelt), read_stages(spelt)) == (read_size(named), read_stages(named))


def test_a_folder_that_describes_no_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not describe an encoder"):
        read_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50", "num_classes": 10}))
    with pytest.raises(ConfigError, match="does not describe an encoder"):
        read_encoder(tmp_path)


def test_weights_of_another_size_are_an_error_that_says_which(tmp_path: Path) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1)
    export_encoder(build_encoder(TINY, views).state_dict(), tmp_path, model=HYBRID, views=views)
    with pytest.raises(ConfigError, match=r"not those of its config\.json(.|\n)*blocks1\.0\.conv1"):
        read_encoder(tmp_path)


def test_low_precision_weights_are_exported_in_full_precision(tmp_path: Path) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1)
    state = build_encoder(TINY, views).bfloat16().state_dict()
    export_encoder(state, tmp_path, model=TINY, views=views)
    written = read_weights(tmp_path)
    assert written.keys() == state.keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}
    assert all(torch.equal(written[name], tensor.float()) for name, tensor in state.items())


def test_an_older_export_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1)
    for _ in range(2):
        state = build_encoder(TINY, views).state_dict()
        export_encoder(state, tmp_path / "run" / "encoder", model=TINY, views=views)
    assert sorted(path.name for path in (tmp_path / "run" / "encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert torch.equal(read_weights(tmp_path / "run" / "encoder")["cls_token"], state["cls_token"])


def test_an_interrupted_export_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = ViewsConfig(img_px=24, master_px=24, shift_px=1)
    state = build_encoder(TINY, views).state_dict()
    export_encoder(state, tmp_path, model=TINY, views=views)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_encoder(build_encoder(TINY, views).state_dict(), tmp_path, model=TINY, views=views)
    assert torch.equal(read_weights(tmp_path)["cls_token"], state["cls_token"])
    assert json.loads((tmp_path / "config.json").read_text())["num_features"] == 32


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict", "teacher"), ("a", "b", "c", "d")])
def test_torch_files_are_read_through_their_wrappers(tmp_path: Path, wrappers: tuple[str, ...]) -> None:
    tensors = {"a": torch.arange(3.0), "b.c": torch.ones(2)}
    content: dict[str, object] = dict(tensors)
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "weights.pth")
    read = read_weights(tmp_path / "weights.pth")
    prefix = "".join(f"{wrapper}." for wrapper in wrappers)
    assert read.keys() == {f"{prefix}{name}" for name in tensors}
    assert all(torch.equal(read[prefix + name], tensor) for name, tensor in tensors.items())


def test_a_dictionary_that_holds_itself_is_no_trap(tmp_path: Path) -> None:
    content: dict[str, object] = {"a": torch.ones(1)}
    content |= {f"again {number}": content for number in range(100)}
    torch.save(content, tmp_path / "weights.pth")
    assert "a" in read_weights(tmp_path / "weights.pth")


def test_safetensors_files_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "weights.safetensors")
    assert read_weights(tmp_path / "weights.safetensors")["a"].tolist() == [0.0, 1.0, 2.0]


def test_a_folder_from_before_safetensors_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["a"].tolist() == [1.0, 1.0]
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert read_weights(tmp_path)["a"].tolist() == [0.0, 0.0]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_torch_file_is_refused_and_never_runs(tmp_path: Path) -> None:
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match="save a dictionary of tensors alone"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x02} cut", b"PK\x03\x04 cut"])
def test_damaged_files_are_an_error_that_names_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        read_weights(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_give_tensors_or_the_error_for_users(tmp_path: Path, name: str, seed: int) -> None:
    path, tensors = tmp_path / name, {"a": torch.ones(3)}
    if name.endswith(".pth"):
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, path)
    damaged, dice = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(3):
        damaged[dice.randrange(len(damaged))] = dice.randrange(256)
    path.write_bytes(damaged)
    with contextlib.suppress(ConfigError):
        read_weights(path)


def test_a_file_without_tensors_is_an_error(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="holds no named tensors"):
        read_weights(tmp_path / "weights.pth")


def test_a_missing_file_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights at .*encoder folder"):
        read_weights(tmp_path / "nowhere.pth")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_weights(tmp_path)
