import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cmae_scale.config.precision import (
    FormatName,
    NumberFormats,
    is_left_to_machine,
    leave_to_machine_,
    list_formats,
    read_formats,
    write_autocast,
)
from cmae_scale.core.errors import ConfigError

ON, OFF = {"enabled": True}, {"enabled": False}
MACHINE = {"torch_autocast": {"enabled": "auto", "dtype": "auto"}}


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
    for read in (read_formats, leave_to_machine_):
        with pytest.raises(ConfigError, match="is no autocast type"):
            read({"torch_autocast": {"enabled": True, "dtype": dtype}})


@pytest.mark.parametrize("enabled", ["yes", "Auto", 3, None])
def test_autocast_is_on_off_or_left_to_the_machine(enabled: Any) -> None:
    with pytest.raises(ConfigError, match='must be true, false or "auto"'):
        leave_to_machine_({"torch_autocast": {"enabled": enabled}})


@pytest.mark.parametrize(
    ("settings", "formats"),
    [
        ({}, ("float32", "float16")),
        (MACHINE, ("float32", "float16")),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, ("float32", "float16")),
        ({"fp16": OFF, "bf16": OFF}, ("float32", "float16")),
        ({"torch_autocast": {"dtype": "bfloat16"}}, ("float32", "bfloat16")),
        ({"torch_autocast": {"enabled": "auto", "dtype": "bf16"}}, ("float32", "bfloat16")),
        ({"torch_autocast": ON}, ("float16",)),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ("bfloat16",)),
        ({"torch_autocast": OFF}, ("float32",)),
        ({"torch_autocast": {"enabled": False, "dtype": "auto"}}, ("float32",)),
        ({"bf16": ON}, ("bfloat16",)),
        ({**MACHINE, "bf16": ON}, ("bfloat16",)),
        ({**MACHINE, "fp16": ON}, ("float16",)),
    ],
)
def test_what_is_not_named_is_left_to_the_machine(settings: dict[str, Any], formats: tuple[str, ...]) -> None:
    settings = json.loads(json.dumps(settings))
    leave_to_machine_(settings)
    assert list_formats(settings, half="float16") == formats


sections = st.dictionaries(
    st.sampled_from(["torch_autocast", "bf16", "fp16"]),
    st.fixed_dictionaries(
        {}, optional={"enabled": st.sampled_from([True, False, "auto"]), "dtype": st.just("auto")}
    ),
)


@given(sections, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_a_settled_run_file_is_read_as_the_same_run(settings: dict[str, Any], compute: FormatName) -> None:
    named = [name for name, section in settings.items() if section.get("enabled") is True]
    assume(len(named) <= 1)  # DeepSpeed refuses more
    leave_to_machine_(settings)
    if is_left_to_machine(settings):
        settings = write_autocast(settings, compute)
        assert read_formats(settings) == (compute, "float32")
    again = json.loads(json.dumps(settings))
    leave_to_machine_(again)
    assert again == settings
    assert list_formats(again, half="bfloat16") == (read_formats(settings).compute,)
    assert "auto" not in json.dumps(again["torch_autocast"]).replace("torch_autocast", "")
