"""A pretrained encoder as a function from images to pooled features."""

import torch

from cmae_scale.config.cmae import Pool
from cmae_scale.config.transfer import CropConfig
from cmae_scale.layers.attention import TORCHS_PICK, AttentionChoice
from cmae_scale.models.networks import build_network
from cmae_scale.models.pretrained import PretrainedEncoder
from cmae_scale.tasks.features import Predict, Preprocessor, predict_with


def build_preprocessor(
    encoder: PretrainedEncoder,
    crop: CropConfig,
    *,
    device: torch.device,
    compute: torch.dtype,
    attention: AttentionChoice = TORCHS_PICK,
) -> Preprocessor:
    """How an encoder's images are prepared: its own colours unless the run file names others."""
    return Preprocessor(crop.mean or encoder.mean, crop.std or encoder.std, device, compute, attention)


def encode_with(
    encoder: PretrainedEncoder, preprocessor: Preprocessor, *, img_px: int, pool: Pool
) -> Predict:
    """The encoder as a function from bytes to pooled features."""
    return predict_with(build_network(encoder, img_px=img_px, pool=pool), preprocessor)
