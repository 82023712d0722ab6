"""What may be a secret is masked wherever it stands, and what is none can still be read."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmae_scale.config.run_file import dump_run, read_run
from cmae_scale.core.credentials import MASK, fill_in, list_masked, mask, mask_tree, write_settings
from cmae_scale.core.errors import ConfigError
from cmae_scale.data.locations import show_location

HIDDEN = [
    "https://user:TOKEN@host/train",
    "https://TOKEN@host/train",
    "https://TOKEN:x-oauth-basic@host:8080/train",
    "https://host/train?sig=TOKEN",
    "https://host/train?sv=2022-11-02&sig=TOKEN%2B&sp=rl",
    "https://host/train?X-Amz-Credential=TOKEN/eu/s3&X-Amz-Signature=TOKEN",
    "https://host/train?TOKEN",
    "https://host/train#access=TOKEN",
    "HTTPS://host/{train,val}-{00..03}.tar?download=true&whatever=TOKEN",
    "s3://KEY:TOKEN@bucket/train",
    "s3://KEY:TO/KEN:TOKEN@bucket/train",
    "gs://bucket/a?token=TOKEN",
    "abfs://container@account/x?sas=TOKEN",
    "pipe:curl -H 'X-Whatever: TOKEN' https://host/{name}",
    "pipe:curl -u user:TOKEN https://host/{name}",
    "pipe:env AWS_SECRET=TOKEN fetch {name}",
    "Authorization: Bearer TOKEN123456",
    "Authorization: TOKEN",
    "cannot read https://u:TOKEN@host/a.tar?sig=TOKEN: status 403",
    'cmae.data.shards=["https://u:TOKEN@host/a", "pipe:cat TOKEN"]',
    "comet.api_key=TOKEN",
]
SHOWN = [
    "shards/train",
    "/data/a b/{train,val}-{000..099}.tar",
    "s3://bucket/train-0?.tar",
    "hf://datasets/user/name@main/data",
    "https://host:8080/a@2x/train?download=true",
    "https://${USER}:${PASSWORD}@host/train?sig=${SIG}",
    "http://[::1]:8080/a@b/train",
    "mask tokens: 69 and 197, token of 16 px",
    "step 3/9: loss 0.1, lr 1e-4; a=b?c",
]


@pytest.mark.parametrize("text", HIDDEN)
def test_a_secret_is_masked_and_stays_so(text: str) -> None:
    masked = mask(text)
    assert "TOKEN" not in masked
    assert MASK in masked
    assert mask(masked) == masked
    assert list(list_masked(mask_tree({"a": {"b": [text]}}))) == ["a.b"]


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert mask(text) == text


@given(st.text(alphabet=":/@?&=#.ab{}$* \n\"'", max_size=40), st.sampled_from(["https", "s3", "pipe", "x-y"]))
def test_masking_ends_and_is_done_once_whatever_the_text(text: str, scheme: str) -> None:
    masked = mask(f"{scheme}://{text}")
    assert mask(masked) == masked


@given(st.text(alphabet="ab/.{}0*", max_size=12), st.text(alphabet="ab&=", max_size=8))
def test_no_place_lets_its_user_or_query_through(path: str, query: str) -> None:
    place = f"https://user:SECRET@host/{path}?{query}&k=SECRET"
    assert "SECRET" not in mask(place) + show_location(place)


def test_settings_are_known_to_be_secret_by_their_names_too() -> None:
    section = {"enabled": True, "api_key": "abc", "project": "cmae", "token": "${TOKEN}"}
    assert mask_tree({"comet": section}) == {"comet": {**section, "api_key": MASK}}


def test_values_come_from_the_environment_when_they_are_used() -> None:
    assert fill_in("https://h/a?sig=${SIG}&b=$SIG", environ={"SIG": "x"}) == "https://h/a?sig=x&b=$SIG"
    with pytest.raises(ConfigError, match=r"asks for a variable that is not set: export SIG="):
        fill_in("https://user:secret@h/a?sig=${SIG}", environ={})


@pytest.mark.parametrize(("text", "mode"), [("{}", 0o644), (f'{{"a": "{MASK}"}}', 0o600)])
def test_settings_that_held_a_secret_are_for_their_owner_alone(tmp_path: Path, text: str, mode: int) -> None:
    path = tmp_path / "config.json"
    umask = os.umask(0o022)
    try:
        for _ in range(2):  # also over a file that is there
            write_settings(path, text)
            assert path.stat().st_mode & 0o777 == mode
            path.chmod(0o644)
    finally:
        os.umask(umask)


@pytest.mark.parametrize("kind", ["cmae", "transfer"])
def test_a_written_run_file_asks_for_its_secrets_again(tmp_path: Path, kind: str) -> None:
    data = {"shards": ["https://u:TOKEN@host/a"], "val_shards": "https://host/b?sig=${SIG}"}
    ours = {
        "cmae": {"model": {"encoder": "vit_small"}},
        "transfer": {"encoder": {"place": "x"}, "task": {"knn": {}}},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"comet": {"api_key": "TOKEN"}, kind: {**ours[kind], "data": data}}))
    text = dump_run(read_run(path, kind=kind))  # type: ignore[arg-type]
    assert "TOKEN" not in text
    assert "${SIG}" in text
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"comet\.api_key, {kind}\.data\.shards held a secret") as error:
        read_run(path, kind=kind)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    again = ["comet.api_key=TOKEN", f'{kind}.data.shards=["https://u:TOKEN@host/a"]']
    assert dump_run(read_run(path, again, kind=kind)) == text  # type: ignore[arg-type]
