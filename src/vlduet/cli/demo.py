"""`vlduet demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlduet.cli._common import Json, print_json

TO = "Folder of the demo; a previous demo in it is replaced."


def demo(
    to: Annotated[Path, typer.Option(help=TO)] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of data order and random numbers.")] = 0,
    minutes: Annotated[
        float | None, typer.Option(help="Desired duration on two cores, by default about ten.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also train with each loss alone; about twice as long."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the whole workflow on real data: fetch, train, evaluate, index, search, ask, report.

    Everything is written to the folder; one that is neither empty nor a demo's is an error. With
    --json, print a summary at the end.
    """
    from vlduet.demo.run import run_demo

    summary = run_demo(to, seed=seed, minutes=minutes, full=full)
    if as_json:
        print_json(summary)
