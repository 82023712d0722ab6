from pathlib import Path

import pytest

from cmae_scale.core.files import LineFile, write_text


def test_lines_that_a_full_disk_refuses_come_later_and_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path)
    assert lines.add("1\n") is None
    kept = path.read_text()
    path.unlink()
    path.symlink_to("/dev/full")
    assert "No space left" in (lines.add("2\n") or "")
    assert "No space left" in (lines.add("3\n") or "")
    path.unlink()
    path.write_text(kept)
    assert lines.add("4\n") is None
    assert path.read_text() == "1\n2\n3\n4\n"


def test_a_torn_line_of_a_killed_process_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('1\n{"step": 2')
    assert LineFile(path).add("3\n") is None
    assert path.read_text() == '1\n{"step": 2\n3\n'


def test_a_lost_folder_is_told_and_loses_nothing(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "gone" / "metrics.jsonl")
    assert lines.add("1\n") is not None
    (tmp_path / "gone").mkdir()
    assert lines.add("2\n") is None
    assert lines.path.read_text() == "1\n2\n"


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_text(path, "old")

    def refuse(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
