"""A linear layer for what must not be rounded to bf16."""

from torch import nn


class ExactLinear(nn.Linear):
    """nn.Linear under a class of its own, whose weights DeepSpeed sends between ranks unrounded.

    With torch_autocast, ZeRO-3 gathers the weights of plain nn.Linear in bf16, and which copy a step sees
    then depends on what was gathered before. That makes no difference where autocast rounds anyway; layers
    that run outside of autocast use this one.
    """
