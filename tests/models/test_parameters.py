"""Sizes of whole models, to the parameter. Large ones are built without memory, on the meta device."""

import pytest
import torch

from cmae_scale.config.cmae import EncoderName, LossConfig, ModelConfig, NetworkConfig
from cmae_scale.config.sizes import read_size, read_stages
from cmae_scale.models import CMAE
from cmae_scale.models.hybrid_classifier import HybridClassifier


def build(encoder: EncoderName, *, patch_size: int = 16, weight: float = 1.0) -> CMAE:
    with torch.device("meta"):
        return CMAE(
            NetworkConfig(
                model=ModelConfig(encoder=encoder, patch_size=patch_size), loss=LossConfig(weight=weight)
            ),
            mask=None,
        )


def num_trained(model: CMAE) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def num_with_positions(model: CMAE) -> int:
    positions = [buffer for name, buffer in model.named_buffers() if name.endswith("pos_embed")]
    return sum(tensor.numel() for tensor in (*model.parameters(), *positions))


@pytest.mark.parametrize(
    ("encoder", "trained"),
    [("vit_small", 55_880_832), ("vit_base", 121_118_208), ("vit_large", 339_357_440)],
)
def test_cmae_trains_as_many_parameters_as_published(encoder: EncoderName, trained: int) -> None:
    assert num_trained(build(encoder)) == trained


def test_cmae_base_is_as_large_as_the_official_model() -> None:
    assert num_with_positions(build("vit_base")) == 208_845_824


def test_the_hybrid_is_as_large_as_convmae() -> None:
    """Source: Alpha-VL/ConvMAE's base model, counted; CMAE* has the official heads and feature decoder."""
    mae, cmae = build("convvit_base", weight=0.0), build("convvit_base")
    assert sum(tensor.numel() for tensor in mae.online_encoder.state_dict().values()) == 88_932_736
    assert num_with_positions(mae) == 115_041_408
    assert num_trained(mae) == 114_790_528
    assert num_trained(cmae) == 124_253_056


@pytest.mark.parametrize(
    ("encoder", "num_classes", "total"),
    [
        ("convvit_base", 0, 84_605_824),
        ("convvit_base", 1000, 85_374_824),
        ("convvit_small", 0, 21_942_528),
        ("convvit_large", 0, 321_952_384),
    ],
)
def test_the_hybrid_classifier_is_as_large_as_convvit(
    encoder: EncoderName, num_classes: int, total: int
) -> None:
    model = ModelConfig(encoder=encoder)
    with torch.device("meta"):
        classifier = HybridClassifier(
            read_size(model), read_stages(model), patch_size=16, grid=14, num_classes=num_classes
        )
    assert sum(parameter.numel() for parameter in classifier.parameters()) == total


@pytest.mark.parametrize(
    ("encoder", "patch_size", "total", "trained"),
    [
        ("vit_base", 16, 111_907_840, 111_655_680),
        ("vit_large", 16, 329_541_888, 329_239_296),
        ("vit_huge", 14, 657_074_508, 656_613_964),
    ],
)
def test_with_weight_zero_it_is_mae(encoder: EncoderName, patch_size: int, total: int, trained: int) -> None:
    model = build(encoder, patch_size=patch_size, weight=0.0)
    assert num_with_positions(model) == total
    assert num_trained(model) == trained
