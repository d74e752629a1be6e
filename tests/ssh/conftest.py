"""Fixtures of the tests that move files."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Return an empty folder of this machine."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder
