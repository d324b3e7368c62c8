"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test may use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/fuzz and tests/slow."""
    parser.addoption("--fuzz-rounds", type=int, help="mutations of each format in tests/fuzz")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of the first mutation")
    parser.addoption("--slow-model", type=Path, help="run tests/slow with this model folder")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave tests/slow out without --slow-model; other paths are decided elsewhere."""
    is_slow = collection_path == Path(__file__).parent / "slow"
    return True if is_slow and config.getoption("--slow-model") is None else None


def pytest_report_header() -> str:
    """Print which mutants the tests include, so that a failure can be repeated."""
    from mutants.mutation import count_groups, current_group, load_mutants

    mutants = load_mutants()
    number = current_group(mutants)
    return f"mutants: VLDUET_MUTANTS={number} of {count_groups(mutants)} groups"


FAMILIES = [
    "fast_vlm",
    "gemma3",
    "llava",
    "mistral3",
    "qwen2_vl",
    "qwen3_vl",
    "internvl",
    "smolvlm",
]
"""Model families that most tests run on; test_families has those that differ in a detail only."""


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of a model family that has a tiny checkpoint; a test that uses it runs for each."""
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A tiny DuetModel of the family; tests must not modify it, because they share it."""
    from helpers import tiny

    return tiny.build_duet_model(tmp_path_factory.mktemp(family) / "base", family=family)
