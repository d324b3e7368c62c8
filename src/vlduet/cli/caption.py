"""`vlduet caption`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(caption)


PROMPT = "Instruction instead of ours; '' goes on from the model's own image prompt, as 'vlduet train' taught it."


def caption(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="A model folder, or any checkpoint that is supported."
        ),
    ],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file of records, or a folder of images.")
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="OUT.jsonl", help="The records with their captions.")
    ],
    short: Annotated[
        int, typer.Option(metavar="TOKENS", help="Longest short caption; 0 writes none.")
    ] = 30,
    long: Annotated[
        int, typer.Option(metavar="TOKENS", help="Longest long caption; 0 writes none.")
    ] = 200,
    prompt: Annotated[str | None, typer.Option(help=PROMPT)] = None,
    drafts: Annotated[
        int, typer.Option(min=1, help="Of so many, take the nearest to the image.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a forward.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the captions that SOURCE lacks. Run it again after an interruption: it goes on."""
    from vlduet.data.quarantine import quarantine_path
    from vlduet.errors import ConfigError
    from vlduet.workflows import captioning

    specs = captioning.build_caption_specs(short=short, long=long, prompt=prompt, drafts=drafts)
    from vlduet.model.duet import DuetModel

    loaded = DuetModel.from_pretrained(model)
    if prompt is None and not loaded.prompts.chat:
        # Asked in a chat it never had with an image, such a model (nano) writes noise.
        fix = "Add --prompt '' to go on from its image prompt (and --long 0 or --short 0), or write an instruction"
        raise ConfigError("this model reads images outside its chat template", place=model, fix=fix)
    report = captioning.write_missing_captions(
        loaded, source, output=to, specs=specs, model_name=model.resolve().name, batch_size=batch
    )
    if as_json:
        print(json.dumps({"file": str(to), **asdict(report)}))
    else:
        print(
            f"{to}: {report.records} records, {report.short} short and {report.long} long captions written"
        )
        if report.empty:
            print(f"{report.empty} captions came out empty")
        if report.dropped:
            print(f"{report.dropped} left out: see {quarantine_path(to)}")
    if not report.records:
        raise typer.Exit(1)
