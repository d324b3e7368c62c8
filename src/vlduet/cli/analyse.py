"""`vlduet analyse`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(analyse)


def analyse(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A model folder, or any checkpoint that is supported."
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A file of records of any kind, or a folder of images."
        ),
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Gets analysis.html and analysis.json.")
    ],
    before: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Another model to stand beside it, such as its base."),
    ] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Images, and texts, that are read: the first of the file.")
    ] = 512,
    examples: Annotated[int, typer.Option(min=0, help="Pictures that attention is drawn on.")] = 8,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as one JSON object.")
    ] = False,
) -> None:
    """Look inside: next-token entropy, explained variance, and attention from the token that an embedding is read at."""
    from vlduet.data.quarantine import Quarantine
    from vlduet.inspect import internals
    from vlduet.model.duet import DuetModel
    from vlduet.reports.pages import write_analysis_page
    from vlduet.reports.terminal import format_analysis

    dropped = Quarantine.create(to / "quarantine.jsonl")
    items = internals.collect_items(file, limit=limit, dropped=dropped)
    folders = {"before": before, "after": model} if before else {model.resolve().name: model}
    measured = []
    for name, folder in folders.items():
        assert folder is not None
        loaded = DuetModel.from_pretrained(folder)
        measured.append(
            internals.analyse_model(loaded, items, name=name, num_attention_maps=examples)
        )
        del loaded  # two models need not fit in memory at once
    words = [
        "vlduet",
        "analyse",
        str(model),
        str(file),
        "--to",
        str(to),
        *(["--before", str(before)] if before else []),
    ]
    command = shlex.join([*words, "--limit", str(limit), "--examples", str(examples)])
    page = to / "analysis.html"
    numbers = internals.summarize(measured)
    internals.write_summary(to / "analysis.json", numbers, source=file, command=command)
    write_analysis_page(page, measured, summaries=numbers, source=file, command=command)
    if as_json:
        facts = {"page": str(page), "dropped": dropped.count, "causes": dropped.count_by_cause()}
        print(json.dumps({**facts, "models": numbers}))
        return
    lines = [
        *format_analysis(numbers),
        f"page: {page}" + (f" ({dropped})" if dropped.count else ""),
    ]
    print("\n".join(lines))
