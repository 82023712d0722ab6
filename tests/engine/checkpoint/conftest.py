"""Training states of tiny runs, made once for all tests that take them up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmae_scale.checkpoints.commit import list_checkpoints
from cmae_scale.core.world import World
from cmae_scale.engine.checkpoint.save_load import check_checkpoint


@pytest.fixture
def saved(
    on_ranks: Callable[..., list[Any]], tiny_run: Callable[..., Any], train_tiny: Callable[..., Any]
) -> Path:
    """The checkpoints of a run with the states of steps 1 and 2, by one rank at stage 0."""
    run = tiny_run()

    def train() -> None:
        train_tiny(run, steps=1, save_at=1)
        train_tiny(run, steps=2, save_at=2)

    on_ranks(train, ranks=1)
    folder: Path = run.out / "checkpoints"
    return folder


@pytest.fixture
def whole_states() -> Callable[[Path], list[str]]:
    """Names of the states in a folder that can be taken up, newest first."""

    def list_whole(folder: Path) -> list[str]:
        return [
            path.name for path in list_checkpoints(folder) if check_checkpoint(path, world=World())[0] is None
        ]

    return list_whole
