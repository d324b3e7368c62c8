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
    numbers = internals.write(to, measured, source=file, command=command)
    if as_json:
        told = {
            "page": str(to / "analysis.html"),
            "dropped": dropped.count,
            "causes": dropped.count_by_cause(),
        }
        print(json.dumps({**told, "models": numbers}))
        return
    for one in numbers:
        for kind in ("images", "texts"):
            if found := one[kind]:
                parts = f"90 % of the variance in {found['components']['0.9']} components"
                print(
                    f"{one['name']}, {found['count']} {kind}: entropy {found['entropy']['mean']:.2f} nats, {parts}"
                )
        if found := one["attention"]:
            print(
                f"{one['name']}, attention to the image: {found['share']['mean']:.2f} of all, "
                f"evenness {found['evenness']['mean']:.2f}"
            )
    print(f"page: {to / 'analysis.html'}" + (f" ({dropped})" if dropped.count else ""))
