import pytest

from cmae_scale.config.cmae import EncoderName, ModelConfig
from cmae_scale.models import EncoderSize, read_size


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_tiny", (192, 12, 3)),
        ("vit_small", (384, 12, 6)),
        ("vit_base", (768, 12, 12)),
        ("vit_large", (1024, 24, 16)),
        ("vit_huge", (1280, 32, 16)),
    ],
)
def test_a_name_stands_for_width_depth_and_heads(name: EncoderName, size: tuple[int, int, int]) -> None:
    assert read_size(ModelConfig(encoder=name)) == EncoderSize(*size)


def test_a_size_can_be_spelt_out() -> None:
    assert read_size(ModelConfig(embed_dim=64, depth=3, num_heads=4)) == EncoderSize(64, 3, 4)
