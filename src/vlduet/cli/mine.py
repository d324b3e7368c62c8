"""`vlduet mine`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(mine)


def mine(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="The model's folder: the one to train, or a better one."
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Pairs with short captions, or retrieval records."),
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="OUT.jsonl", help="The records with negatives.")
    ],
    query: Annotated[
        str, typer.Option(help="The side of a pair that asks: image or text.")
    ] = "image",
    k: Annotated[int, typer.Option("-k", min=1, help="New negatives a record.")] = 4,
    margin: Annotated[
        float,
        typer.Option(
            help="Cosine that a negative must stay below the positive; else it may well be right."
        ),
    ] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find hard negatives for FILE: what the model takes for right and is not. Run it again after an interruption."""
    from vlduet.data.quarantine import quarantine_path
    from vlduet.encoders.dual import open_embedder
    from vlduet.workflows import mining

    loaded = open_embedder(model)
    report = mining.mine_hard_negatives(
        loaded, file, output=to, query_side=cast("Any", query), num_negatives=k, margin=margin
    )
    if as_json:
        print(json.dumps({"file": str(to), **asdict(report)}))
        return
    print(
        f"{to}: {report.records} records, {report.negatives} new negatives; {report.without} records without any"
    )
    print(
        f"{report.too_near} candidates left out as perhaps right: raise or lower --margin to see more or fewer go"
    )
    if report.negative_score is not None:
        print(
            f"mean cosine {report.positive_score:.3f} to the positive, {report.negative_score:.3f} to the negatives"
        )
    if report.dropped:
        print(f"{report.dropped} left out: see {quarantine_path(to)}")
