"""`vlduet analyse` and `vlduet align`: analysis of a model, and of two records."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlduet.cli._common import (
    Columns,
    Format,
    Json,
    ModelFolder,
    Root,
    Strict,
    drop_counts,
    make_source,
    print_json,
    print_text,
    read_record_at,
)

if TYPE_CHECKING:
    from vlduet.data.records import Record

BEFORE = "Another model to compare with, such as the base model."
CONFIG = "A config of recipe sugar: compare with its encoders and options."
FIGURE = "Also draw a figure, as .svg or .png."
DELTA = "Width of the kernel, by default the config's or 1."

RecordPlace = Annotated[
    str, typer.Argument(metavar="FILE[:N]", help="Record N of a file, from 0; by default 0.")
]


def analyse(
    model: ModelFolder,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file of records, or a folder of images.")
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Gets analysis.html and analysis.json.")
    ],
    before: Annotated[Path | None, typer.Option(metavar="DIR", help=BEFORE)] = None,
    limit: Annotated[
        int, typer.Option(min=2, help="Maximum number of images, and of texts.")
    ] = 512,
    examples: Annotated[int, typer.Option(min=0, help="Number of attention maps.")] = 8,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Measure next-token entropy, explained variance, and attention from the summary token.

    Reads the first distinct images and texts of FILE with MODEL, and with --before with that model
    too. Prints a summary, and writes analysis.html and analysis.json. Broken records are left out
    and listed in DIR/quarantine.jsonl. A FILE without any image or text is an error.
    """
    from vlduet.data.quarantine import Quarantine
    from vlduet.inspect import internals
    from vlduet.locks import lock_folder
    from vlduet.model.duet import DuetModel
    from vlduet.reports.pages import write_analysis_page
    from vlduet.reports.terminal import format_analysis

    with lock_folder(to):
        dropped = Quarantine.create(to / "quarantine.jsonl")
        source = make_source(file, format=format, root=root, columns=columns, strict=strict)
        items = internals.collect_items(source, limit=limit, dropped=dropped)
        folders = {"before": before, "after": model} if before else {model.resolve().name: model}
        analyses = []
        for name, folder in folders.items():
            assert folder is not None
            loaded = DuetModel.from_pretrained(folder)
            analysis = internals.analyse_model(
                loaded, items, name=name, num_attention_maps=examples
            )
            analyses.append(analysis)
            del loaded  # two models need not fit in memory at once
        words = ["vlduet", "analyse", str(model), str(file), "--to", str(to)]
        if before:
            words += ["--before", str(before)]
        command = shlex.join([*words, "--limit", str(limit), "--examples", str(examples)])
        page = to / "analysis.html"
        summaries = internals.summarize(analyses)
        internals.write_summary(to / "analysis.json", summaries, source=file, command=command)
        write_analysis_page(page, analyses, summaries=summaries, source=file, command=command)
    if as_json:
        print_json({"page": str(page), **drop_counts(dropped), "models": summaries})
        return
    print_text("\n".join(format_analysis(summaries)))
    print_text(f"page: {page}" + (f" ({dropped})" if dropped.count else ""))


def align(
    first: RecordPlace,
    second: RecordPlace,
    *,
    config: Annotated[str | None, typer.Option("--config", help=CONFIG)] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Compare with the embeddings of a model."),
    ] = None,
    delta: Annotated[float | None, typer.Option(min=0.01, help=DELTA)] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Also write a page.")
    ] = None,
    figure: Annotated[Path | None, typer.Option("--figure", metavar="FILE", help=FIGURE)] = None,
    as_json: Json = False,
) -> None:
    """Show how two records align, slice by slice.

    Slices, which are images and sentences, are compared by the encoders of --config or the
    embeddings of --model; exactly one of them must be given. With --html, also write a page, and
    with --figure two rows of slices with links where the alignment passes. A record that does not
    exist or has no slice is an error.
    """
    from vlduet.config import load_run_config
    from vlduet.errors import ConfigError
    from vlduet.inspect import alignment
    from vlduet.reports.alignment_figure import find_format, write_alignment_figure
    from vlduet.reports.terminal import format_alignment

    if (config is None) == (model is None):
        fix = "Give either --config or --model"
        raise ConfigError("nothing to compare with, or two things", fix=fix)
    if figure is not None:
        find_format(figure)  # before anything is computed
    records = _read_record(first), _read_record(second)
    slices = tuple(part for record in records for part in alignment.split_into_slices(record))
    if config is not None:
        run_config = load_run_config(config)
        recipe = run_config.recipe
        if recipe.get("name") != "sugar":
            fix = "Name a config of recipe sugar"
            raise ConfigError(f"recipe '{recipe.get('name')}'", place=config, fix=fix)
        source = f"the encoders of {config}"
        cosines = alignment.config_encoder_cosines(slices, run_config)
        delta = float(recipe.get("delta", 1.0)) if delta is None else delta
    else:
        from vlduet.encoders.dual import open_embedder

        assert model is not None
        source = f"the embeddings of {model}"
        cosines = alignment.model_cosines(slices, open_embedder(model))
    result = alignment.align_records(
        *records, cosines=cosines, source=source, delta=1.0 if delta is None else delta
    )
    if html is not None:
        from vlduet.reports.pages import write_alignment_page

        write_alignment_page(html, result)
    if figure is not None:
        write_alignment_figure(figure, result)
    if as_json:
        print_json(result.to_json())
        return
    print_text(format_alignment(result))
    for path in filter(None, (html, figure)):
        print_text(path)


def _read_record(place: str) -> Record:
    """Return the record that ``FILE:N`` names, or the first one of ``FILE``.

    A text behind the last colon that is no number belongs to the file's name. Raises DataError as
    `read_record_at`: the file cannot be read, or has too few records.
    """
    file, colon, number = place.rpartition(":")
    if colon and number.isdecimal():
        return read_record_at(make_source(Path(file)), int(number))
    return read_record_at(make_source(Path(place)), 0)
