import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.core.cli import read_count
from cmae_scale.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1281167", 1_281_167),
        ("1_281_167", 1_281_167),
        ("1,281,167", 1_281_167),
        ("1.28M", 1_280_000),
        ("1.281167M", 1_281_167),
        ("50k", 50_000),
        ("50K", 50_000),
        ("2g", 2_000_000_000),
        ("400.", None),
        ("1.5", None),
        ("1.2811675M", None),
        ("0", None),
        ("0k", None),
        ("-5", None),
        ("1e6", None),
        ("1,28M", None),
        ("1__000", None),
        ("1.28MB", None),
        ("M", None),
        ("٣", None),
        ("", None),
    ],
)
def test_a_count_is_read_as_people_write_it_or_refused(text: str, count: int | None) -> None:
    if count is None:
        with pytest.raises(ConfigError, match="is no count: write a whole number"):
            read_count(text)
    else:
        assert read_count(text) == count


@given(count=st.integers(1, 10**13))
def test_every_way_to_write_a_count_gives_the_count(count: int) -> None:
    assert read_count(f"{count}") == read_count(f"{count:_}") == read_count(f"{count:,}") == count
    assert read_count(f"{count // 1000}.{count % 1000:03}k" if count >= 1000 else f"{count}") == count
