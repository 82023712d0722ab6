"""The number formats that a ds_config asks for, before torch is loaded."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from cmae_scale.core.errors import ConfigError

FormatName = Literal["float32", "bfloat16", "float16"]

_SHORT: dict[str, FormatName] = {"bf16": "bfloat16", "fp16": "float16"}
_BYTES: dict[FormatName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class NumberFormats(NamedTuple):
    """`compute` is the format of matrix products; `parameters` that of the weights the model runs on."""

    compute: FormatName
    parameters: FormatName

    @property
    def compute_bytes(self) -> int:
        """Size of one number in a matrix product."""
        return _BYTES[self.compute]

    @property
    def parameter_bytes(self) -> int:
        """Size of one weight that the model runs on, and of one number of the residual stream."""
        return _BYTES[self.parameters]

    @property
    def is_autocast(self) -> bool:
        """Whether weights are rounded for each product, and kept in both formats until backward."""
        return self.compute != self.parameters


def read_formats(settings: Mapping[str, Any]) -> NumberFormats:
    """The formats of a ds_config. Raises ConfigError for an autocast type that does not exist."""
    if settings.get("bf16", {}).get("enabled", False):
        return NumberFormats("bfloat16", "bfloat16")
    if settings.get("fp16", {}).get("enabled", False):
        return NumberFormats("float16", "float16")
    autocast = settings.get("torch_autocast", {})
    if not autocast.get("enabled", False):
        return NumberFormats("float32", "float32")
    named = str(autocast.get("dtype", "bfloat16")).removeprefix("torch.")
    compute = _SHORT.get(named, named)
    for known in get_args(FormatName)[1:]:
        if compute == known:
            return NumberFormats(known, "float32")
    raise ConfigError(f'torch_autocast.dtype: "{named}" is no autocast type: write "bfloat16" or "float16"')
