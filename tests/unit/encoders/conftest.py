"""Folders of tiny frozen encoders, one per role."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import tiny


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return role -> folder of a tiny checkpoint; tests must not change them."""
    return tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders"))
