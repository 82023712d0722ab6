"""A folder of shards in which something has the name of a file of ours and is none."""

from pathlib import Path

import pytest

from cmae_scale.core.cli import run_command
from data_prep.locks import MERGING
from data_prep.make_shards import main
from data_prep.manifest import OPTIONS_NAME, SKIPPED_NAME

NAMES = [
    *(OPTIONS_NAME, SKIPPED_NAME, MERGING, ".making-1-of-1.lock", "index.json", "shard-00000.tar"),
    *(".shard-00000.tar.done.json", "shard-00000.offsets", "index.json.part", ".shard-00000.tar.1a.part"),
]


@pytest.mark.parametrize("is_link", [False, True], ids=["folder", "link to nothing"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_passed_over_or_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, is_link: bool
) -> None:
    out = tmp_path / "digits"
    (out / "train").mkdir(parents=True)
    odd = out / "train" / name
    odd.symlink_to("nowhere") if is_link else odd.mkdir()
    status = run_command(main, ["--source", "digits", "--limit", "20", "--out", str(out)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert (status, "error: " in said) in ((0, False), (2, True)), said
