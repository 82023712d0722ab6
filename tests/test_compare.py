"""The command that draws runs beside each other."""

import pytest

from cmae_scale.compare import main


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        (["A=x", "A=y"], '"A" names both x and y'),
        (["A=x", "A=x"], '"A" names both x and x'),
        (["x"], "write NAME=RUN"),
        (["A="], "write NAME=RUN"),
        (["=x"], "write NAME=RUN"),
    ],
)
def test_a_run_without_a_name_of_its_own_is_refused(
    runs: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(runs) == 2
    assert told in capsys.readouterr().err
