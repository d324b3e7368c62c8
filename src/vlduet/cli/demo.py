"""`vlduet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(demo)


def demo(
    to: Annotated[
        Path, typer.Option(help="Folder of the demo; a former demo in it is replaced.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the training order and its random numbers.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Wanted length on two cores; the usual one is about ten.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False,
) -> None:
    """The main job on real data: fetch, build, train, evaluate, index, search, ask, and a report of it all."""
    import json

    from vlduet.demo.run import run_demo

    found = run_demo(to, seed=seed, minutes=minutes)
    if as_json:
        typer.echo(json.dumps(found))
