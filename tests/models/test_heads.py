import pytest
import torch

from cmae_scale.config.cmae import HeadsConfig
from cmae_scale.models.heads import Predictor, Projector

SMALL = HeadsConfig(hidden_dim=10, out_dim=6)


def test_a_head_is_linear_norm_relu_linear(rng: torch.Generator) -> None:
    head = Projector(8, SMALL)
    features = torch.randn(5, 8, generator=rng)
    hidden = features @ head.fc1.weight.T + head.fc1.bias
    normed = (hidden - hidden.mean(dim=0)) / (hidden.var(dim=0, unbiased=False) + 1e-6).sqrt()
    expected = normed.clamp(min=0) @ head.fc2.weight.T
    torch.testing.assert_close(head(features), expected)


def test_a_layer_norm_head_treats_every_image_alone(rng: torch.Generator) -> None:
    head = Projector(8, SMALL.model_copy(update={"norm": "layer"}))
    features = torch.randn(5, 8, generator=rng)
    alone = torch.cat([head(row[None]) for row in features])
    torch.testing.assert_close(head(features), alone)
    hidden = features @ head.fc1.weight.T + head.fc1.bias
    normed = torch.nn.functional.layer_norm(hidden, (10,), eps=1e-6)
    torch.testing.assert_close(head(features), normed.clamp(min=0) @ head.fc2.weight.T)


def test_autocast_does_not_lower_a_heads_precision(rng: torch.Generator) -> None:
    head = Projector(8, SMALL)
    features = torch.randn(5, 8, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = head(features)
    assert vectors.dtype == torch.float32
    assert torch.equal(vectors, head(features))


@pytest.mark.parametrize(
    ("head", "total"),
    [(Projector(768, HeadsConfig()), 1_577_472), (Predictor(HeadsConfig()), 791_040)],
    ids=["projector", "predictor"],
)
def test_heads_of_vit_base_are_as_large_as_published(head: torch.nn.Module, total: int) -> None:
    assert sum(parameter.numel() for parameter in head.parameters()) == total


def test_the_last_linear_has_no_bias() -> None:
    assert Projector(8, SMALL).fc2.bias is None
    assert Predictor(SMALL).fc2.bias is None
