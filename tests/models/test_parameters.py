"""Sizes of whole models, to the parameter. Large ones are built without memory, on the meta device."""

import pytest
import torch

from cmae_scale.core.settings import CmaeConfig, DataConfig, EncoderName, LossConfig, ModelConfig
from cmae_scale.models import CMAE


def build(encoder: EncoderName, *, patch_size: int = 16, weight: float = 1.0) -> CMAE:
    with torch.device("meta"):
        return CMAE(
            CmaeConfig(
                model=ModelConfig(encoder=encoder, patch_size=patch_size),
                data=DataConfig(shards="shards"),
                loss=LossConfig(weight=weight),
            )
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
