"""Command lines of vlduet that run in the process of the test."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from vlduet.cli.main import app


def invoke(*arguments: object) -> Result:
    """Run a vlduet command and return its result; raise its error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result
