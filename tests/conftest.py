"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a bug
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(
    scope="session",
    params=[
        "fast_vlm",
        "gemma3",
        "llava",
        "mistral3",
        "qwen2_vl",
        "qwen3_vl",
        "internvl",
        "smolvlm",
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    """Families of checkpoints with a tiny twin; test_families has those that are one of them but for a detail."""
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A tiny DuetModel of every family; tests must not change it."""
    from helpers import tiny

    return tiny.build_duet_model(tmp_path_factory.mktemp(family) / "base", family=family)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Small files that are committed."""
    return Path(__file__).parent / "assets"
