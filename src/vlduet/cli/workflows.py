"""`vlduet caption` and `vlduet mine`: new records from records, written by a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from vlduet.cli._common import (
    Columns,
    Format,
    Json,
    ModelFolder,
    QueryFile,
    Root,
    Source,
    Strict,
    format_left_out,
    make_source,
    print_json,
    print_text,
)

PROMPT = "Instruction to use; '' continues the model's own image prompt, as it was trained."
DRAFTS = "Number of drafts, of which the one nearest to the image is taken."
MARGIN = "Minimum difference of cosine to the positive; nearer candidates may be correct."


def caption(
    model: ModelFolder,
    source: Source,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="Records with captions.")],
    short: Annotated[
        int, typer.Option(metavar="TOKENS", help="Length limit of short captions; 0 writes none.")
    ] = 30,
    long: Annotated[
        int, typer.Option(metavar="TOKENS", help="Length limit of long captions; 0 writes none.")
    ] = 200,
    prompt: Annotated[str | None, typer.Option(help=PROMPT)] = None,
    drafts: Annotated[int, typer.Option(min=1, help=DRAFTS)] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 16,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write the records of SOURCE with the captions that they lack, and print the counts.

    Captions that exist are kept. Broken records are left out and listed in OUT.quarantine.jsonl. An
    interrupted run continues when it is started again. A model that reads images outside its chat
    template needs --prompt, and --prompt needs --short 0 or --long 0. The exit status is 1 if
    SOURCE has no usable record.
    """
    from vlduet.data.quarantine import quarantine_path
    from vlduet.errors import ConfigError
    from vlduet.workflows.captioning import build_caption_specs, write_missing_captions

    specs = build_caption_specs(short=short, long=long, prompt=prompt, drafts=drafts)
    from vlduet.model.duet import DuetModel

    loaded = DuetModel.from_pretrained(model)
    if prompt is None and not loaded.prompts.chat:
        # Such a model (nano) never saw an image in a chat and would write noise.
        fix = (
            "Add --prompt '' to continue its image prompt (and --long 0 or --short 0), "
            "or write an instruction"
        )
        message = "this model reads images outside its chat template"
        raise ConfigError(message, place=model, fix=fix)
    name = model.resolve().name
    report = write_missing_captions(
        loaded,
        make_source(source, format=format, root=root, columns=columns, strict=strict),
        output=to,
        specs=specs,
        model_name=name,
        batch_size=batch,
    )
    if as_json:
        print_json({"file": str(to), **asdict(report)})
    else:
        captions = f"{report.short} short and {report.long} long captions written"
        print_text(f"{to}: {report.records} records, {captions}")
        if report.empty:
            print_text(f"{report.empty} captions came out empty")
        if report.dropped:
            print_text(format_left_out(report.causes, source, listing=quarantine_path(to)))
    if not report.records:
        raise typer.Exit(1)


def mine(
    model: ModelFolder,
    file: QueryFile,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="Records with negatives.")],
    query: Annotated[str, typer.Option(help="Query side of a pair: image or text.")] = "image",
    k: Annotated[int, typer.Option("-k", min=1, help="New negatives per record.")] = 4,
    margin: Annotated[float, typer.Option(help=MARGIN)] = 0.05,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write FILE with hard negatives: wrong candidates that the model ranks near correct ones.

    Prints the counts. Vectors stay in a folder OUT.vectors for the next run, so that an interrupted
    run continues when it is started again. Broken records are left out and listed in
    OUT.quarantine.jsonl; it is an error if no usable record remains.
    """
    from vlduet.data.quarantine import quarantine_path
    from vlduet.encoders.dual import open_embedder
    from vlduet.workflows.mining import mine_hard_negatives

    report = mine_hard_negatives(
        open_embedder(model),
        make_source(file, format=format, root=root, columns=columns, strict=strict),
        output=to,
        query_side=cast("Any", query),
        num_negatives=k,
        margin=margin,
    )
    if as_json:
        print_json({"file": str(to), **asdict(report)})
        return
    negatives = f"{report.negatives} new negatives; {report.without} records without any"
    print_text(f"{to}: {report.records} records, {negatives}")
    print_text(
        f"{report.too_near} candidates left out as possibly correct: change --margin to adjust"
    )
    if report.negative_score is not None:
        positive = f"{report.positive_score:.3f} to the positive"
        print_text(f"mean cosine {positive}, {report.negative_score:.3f} to the negatives")
    if report.dropped:
        print_text(format_left_out(report.causes, file, listing=quarantine_path(to)))
