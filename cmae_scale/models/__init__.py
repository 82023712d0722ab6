"""The networks of CMAE, built from the run file's settings, and the way in and out for their weights; their
sizes, operations and memory in closed form. Imports `core`, `layers` and `losses`; knows no files of a run.

What computes with sizes alone (flops, parameters, activations, zero, memory) must not wait for torch to load,
so the names below are looked up when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmae_scale.models.sizes import EncoderSize, read_size

if TYPE_CHECKING:
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
_HOMES = {"CMAE": "cmae", "CMAEOutput": "cmae", "build_cmae": "cmae", "ImageEncoder": "encoder"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return vars(import_module(f"cmae_scale.models.{_HOMES.get(name, 'read')}"))[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
