"""Fixtures of the tests of the command line."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import typer.testing


@pytest.fixture(scope="session", autouse=True)
def shared_command_tree() -> Iterator[None]:
    """Build the tree of commands once: `CliRunner` builds it again for each command line."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(typer.testing._get_command)
        patch.setattr(typer.testing, "_get_command", cached)
        yield
