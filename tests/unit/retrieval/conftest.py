"""A fake model and a small source to index."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.fake_embedder import FakeModel, write_pairs


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def other_model() -> FakeModel:
    return FakeModel("another")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "source")
