"""What is minimised: pure functions of tensors, in fp32, without parameters. Imports nothing of ours."""

from cmae_scale.losses.contrast import byol, infonce
from cmae_scale.losses.pixels import patch_statistics, pixel_loss

__all__ = ["byol", "infonce", "patch_statistics", "pixel_loss"]
