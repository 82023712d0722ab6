"""Shared fixtures. Shapes in signatures are checked while tests run (jaxtyping with beartype)."""

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu") if not Path("/dev/nvidia0").exists() else None

import jaxtyping

jaxtyping.install_import_hook(
    ["cmae_scale.layers", "cmae_scale.losses", "cmae_scale.models", "cmae_scale.augment"], "beartype.beartype"
)

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def repository() -> Path:
    return REPOSITORY


@pytest.fixture
def shared_data() -> Path:
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real images of ../shared/data are not here")
    return folder
