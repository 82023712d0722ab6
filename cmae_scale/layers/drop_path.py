"""Stochastic depth whose luck is given: a row's residual branches are left out as its own numbers say."""

from jaxtyping import Float
from timm.layers import DropPath as TimmDropPath
from torch import Tensor, nn


class GivenDropPath(nn.Module):
    """timm's DropPath with the rows to drop set beforehand, so that they do not depend on who computes them.

    In evaluation, and where nothing was set, all rows pass. Source: timm drop_path, scale_by_keep.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniform: Tensor | None = None  # a number in [0, 1) per row; below `rate` = dropped

    def forward(self, tokens: Float[Tensor, "batch tokens embed"]) -> Float[Tensor, "batch tokens embed"]:
        """The rows that stay, scaled so that the mean is kept; zeros for the others."""
        if not self.training or self.uniform is None:
            return tokens
        factor = (self.uniform >= self.rate).to(tokens.dtype) / (1 - self.rate)
        return tokens * factor[:, None, None]


def take_over_drop_paths_(model: nn.Module) -> list[GivenDropPath]:
    """Put one of ours in the place of each of timm's in `model`; in the model's order."""
    ours = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, TimmDropPath):
                given = GivenDropPath(float(child.drop_prob))
                setattr(module, name, given)
                ours.append(given)
    return ours


def set_drop_paths_(paths: list[GivenDropPath], uniform: Float[Tensor, "batch paths"]) -> None:
    """Give each path its column, for the next forward pass."""
    for path, column in zip(paths, uniform.unbind(1), strict=True):
        path.uniform = column
