"""The number formats that a ds_config asks for, or leaves to the machine, before torch is loaded."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from cmae_scale.core.errors import ConfigError

FormatName = Literal["float32", "bfloat16", "float16"]

AUTOCAST = "torch_autocast"
SECTIONS = (AUTOCAST, "bf16", "fp16")  # of a ds_config, that say in which formats a run computes

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
    """The formats of a ds_config without "auto". Raises ConfigError for an autocast type that is none."""
    if _is_on(settings, "bf16"):
        return NumberFormats("bfloat16", "bfloat16")
    if _is_on(settings, "fp16"):
        return NumberFormats("float16", "float16")
    autocast = settings.get(AUTOCAST, {})
    if not autocast.get("enabled", False):
        return NumberFormats("float32", "float32")
    return NumberFormats(_read_dtype(autocast.get("dtype", "bfloat16")), "float32")


def leave_to_machine_(settings: dict[str, Any]) -> None:
    """Write "auto" where a ds_config names no precision, in place: fp32 or half of it, what is faster.

    Other front ends of DeepSpeed write "auto" into bf16 and fp16 too. Those engines round the weights, which
    nobody should get unasked, so there it is read as off. Raises ConfigError for a value that means nothing.
    """
    for name in ("bf16", "fp16"):
        if settings.get(name, {}).get("enabled") == "auto":
            settings[name]["enabled"] = False
    autocast = settings.setdefault(AUTOCAST, {})
    if autocast.setdefault("enabled", "auto") not in (True, False, "auto"):
        raise ConfigError(f'{AUTOCAST}.enabled must be true, false or "auto", not {autocast["enabled"]!r}')
    if autocast["enabled"] == "auto" and (_is_on(settings, "bf16") or _is_on(settings, "fp16")):
        autocast["enabled"] = False
    if autocast.get("dtype", "auto") != "auto":
        _read_dtype(autocast["dtype"])
    elif autocast["enabled"] is False:
        autocast.pop("dtype", None)
    else:
        autocast["dtype"] = "auto"


def list_formats(settings: Mapping[str, Any], *, half: FormatName) -> tuple[FormatName, ...]:
    """The formats that products may have; of two, the faster one is wanted.

    `half` is what the machine has of half the size. What was named stands alone.
    """
    autocast = settings.get(AUTOCAST, {})
    if autocast.get("enabled", False) is False:
        return (read_formats(settings).compute,)
    low = half if autocast.get("dtype") == "auto" else _read_dtype(autocast.get("dtype", "bfloat16"))
    return ("float32", low) if autocast["enabled"] == "auto" else (low,)


def write_autocast(settings: Mapping[str, Any], compute: FormatName) -> dict[str, Any]:
    """The same ds_config with products in `compute` and weights in fp32, so that nothing is left "auto"."""
    autocast = {**settings.get(AUTOCAST, {}), "enabled": compute != "float32", "dtype": compute}
    if compute == "float32":
        del autocast["dtype"]
    return {**settings, AUTOCAST: autocast}


def is_left_to_machine(settings: Mapping[str, Any]) -> bool:
    """Whether the machine decides: see `leave_to_machine_`."""
    autocast = settings.get(AUTOCAST, {})
    return "auto" in (autocast.get("enabled"), autocast.get("dtype"))


def _is_on(settings: Mapping[str, Any], name: str) -> bool:
    return settings.get(name, {}).get("enabled", False) not in (False, "auto")


def _read_dtype(value: Any) -> FormatName:
    named = str(value).removeprefix("torch.")
    compute = _SHORT.get(named, named)
    for known in get_args(FormatName)[1:]:
        if compute == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(
        f'{AUTOCAST}.dtype: "{named}" is no autocast type: write "auto", "bfloat16" or "float16"'
    )
