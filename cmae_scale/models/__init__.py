"""The networks of CMAE, built from the run file's settings, and the way in and out for their weights.
Imports `core`, `layers`, `losses` and `sizing`; knows no optimizer, no ranks and no files of a run.
"""

from cmae_scale.config.sizes import EncoderSize, read_size
from cmae_scale.models.cmae import CMAE, CMAEOutput, build_cmae
from cmae_scale.models.encoder import ImageEncoder
from cmae_scale.models.read import EncoderDescription, read_classifier, read_description, read_encoder

__all__ = [
    "CMAE",
    "CMAEOutput",
    "EncoderDescription",
    "EncoderSize",
    "ImageEncoder",
    "build_cmae",
    "read_classifier",
    "read_description",
    "read_encoder",
    "read_size",
]
