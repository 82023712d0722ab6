"""A run folder whose parts cannot be used is refused while all that lies in it is as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cmae_scale.core.errors import ConfigError
from cmae_scale.core.world import World
from cmae_scale.engine.process.lifecycle import PART_FILES, PART_FOLDERS, open_folder


def lead_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("not_mounted"))


def lead_in_circles(path: Path) -> None:
    path.symlink_to(path)


FAULTS: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "link to nothing": (PART_FOLDERS + PART_FILES, lead_nowhere),
    "link to itself": (PART_FOLDERS + PART_FILES, lead_in_circles),
    "file for a folder": (PART_FOLDERS, Path.touch),
    "folder for a file": (PART_FILES, Path.mkdir),
    "device for a file": (PART_FILES, lambda path: path.symlink_to("/dev/null")),
}


def read_all(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("fault", "part"), [(fault, part) for fault, (parts, _) in FAULTS.items() for part in parts]
)
def test_a_part_that_cannot_be_used_is_named_before_anything_is_touched(
    tmp_path: Path, fault: str, part: str
) -> None:
    run = tmp_path / "run"
    (run / part).parent.mkdir(parents=True)
    if part != "metrics.jsonl":
        (run / "metrics.jsonl").write_text('{"step": 7}\n')
    FAULTS[fault][1](run / part)
    before = read_all(run)
    with pytest.raises(ConfigError, match="cannot write into the run folder") as error:
        open_folder(run, world=World())
    assert str(run / part) in str(error.value)
    assert read_all(run) == before


@pytest.mark.parametrize("part", PART_FOLDERS)
def test_parts_are_tried_for_writing(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmae_scale.engine.process import lifecycle

    write = lifecycle.write_text

    def refuse_below_part(path: Path, text: str) -> None:
        if path.parent.name == part:
            raise OSError(30, "Read-only file system")
        write(path, text)

    monkeypatch.setattr(lifecycle, "write_text", refuse_below_part)
    open_folder(tmp_path, world=World())
    (tmp_path / part).mkdir()
    with pytest.raises(ConfigError, match=f"{part}: Read-only file system"):
        open_folder(tmp_path, world=World())


def test_folders_on_other_disks_are_fine_and_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 7}\n')
    before = read_all(tmp_path)
    open_folder(tmp_path / "run", world=World())
    assert read_all(tmp_path) == before
