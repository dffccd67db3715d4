"""Shared fixtures: where reference data lies, and quiet, reproducible runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Lightning itself calls jsonargparse with an option that was renamed
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

# tests fork, and a forked process hangs in its first parallel region if its parent has been in one before
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with fixtures and real data, named by ``CBM_SHARED``; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("CBM_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no reference data at {folder}: set CBM_SHARED to the folder that holds data/ and golden/")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
