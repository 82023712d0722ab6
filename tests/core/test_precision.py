from typing import Any

import pytest

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.precision import NumberFormats, read_formats


@pytest.mark.parametrize(
    ("settings", "compute", "parameters"),
    [
        ({}, "float32", "float32"),
        ({"torch_autocast": {"enabled": False}}, "float32", "float32"),
        ({"torch_autocast": {"enabled": True}}, "bfloat16", "float32"),
        ({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}, "float16", "float32"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, "float16", "float32"),
        ({"bf16": {"enabled": True}}, "bfloat16", "bfloat16"),
        ({"fp16": {"enabled": True}}, "float16", "float16"),
    ],
)
def test_the_formats_are_those_that_the_settings_ask_for(
    settings: dict[str, Any], compute: str, parameters: str
) -> None:
    formats = read_formats(settings)
    assert (formats.compute, formats.parameters) == (compute, parameters)
    assert formats.is_autocast is (compute != parameters)


def test_sizes_are_in_bytes() -> None:
    assert NumberFormats("bfloat16", "float32").compute_bytes == 2
    assert NumberFormats("bfloat16", "float32").parameter_bytes == 4


@pytest.mark.parametrize("dtype", ["float32", "int8", "bf61"])
def test_an_autocast_type_that_does_not_exist_is_an_error(dtype: str) -> None:
    with pytest.raises(ConfigError, match="is no autocast type"):
        read_formats({"torch_autocast": {"enabled": True, "dtype": dtype}})
