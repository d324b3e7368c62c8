"""Frozen encoders of all roles."""

from __future__ import annotations

import pytest

from helpers import tiny


@pytest.fixture(scope="package")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny encoders by role: vision, text and cross."""
    folders = tiny.build_frozen_encoders(tmp_path_factory.mktemp("encoders"))
    return {role: str(folder) for role, folder in folders.items()}
