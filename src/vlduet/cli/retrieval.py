"""`vlduet search` and `ask`, and `vlduet index check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from vlduet.cli._common import Json, print_json, print_text
from vlduet.cli.queries import Images, QueryFile, Texts, read_query
from vlduet.logs import logger, strip_control_characters

if TYPE_CHECKING:
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import Hit

WHERE = (
    "Filter on metadata: key=value, !=, <, <=, >, >=, 'key in a,b', 'key contains a'. Combine by "
    "'and', or repeat it."
)
QUESTION = "Text of the question, behind those of --text and --image."
SCOPE = "What of a conversation in --query is the query: its last message, or all of it."
LAST_TEXT = "Text of the query, behind those of --text and --image."
THRESHOLD = "Lowest score of a hit, from -1 to 1."
SAMPLE = "Number of documents whose neighbours are searched."
LIKE = "Search what is like the document with this id, instead of a query."
DISTINCT = "Print only the best of several documents with identical content."
EXACT = "Compare every document, also if the index has an approximate search."
MODEL = "Folder of the model, if the index cannot find it."

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
Filters = Annotated[list[str] | None, typer.Option("--where", metavar="CONDITION", help=WHERE)]
OtherModel = Annotated[Path | None, typer.Option("--model", metavar="DIR", help=MODEL)]


def search(
    context: typer.Context,
    folder: IndexFolder,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help=LAST_TEXT)] = None,
    *,
    texts: Texts = None,
    images: Images = None,
    query_file: QueryFile = None,
    like: Annotated[str | None, typer.Option("--like", metavar="ID", help=LIKE)] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="Hits left out at the beginning.")] = 0,
    threshold: Annotated[float | None, typer.Option(help=THRESHOLD)] = None,
    distinct: Annotated[bool, typer.Option("--distinct", help=DISTINCT)] = False,
    exact: Annotated[bool, typer.Option("--exact", help=EXACT)] = False,
    where: Filters = None,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Print the documents that are nearest to texts and images in order, the best first.

    The output is a table on a terminal and tab-separated lines elsewhere. An empty query, a model
    that did not build the index, and a filter on metadata that no document has are errors.
    """
    from vlduet.encoders.dual import open_embedder
    from vlduet.errors import RetrievalError
    from vlduet.retrieval.search import SearchOptions, search_similar
    from vlduet.retrieval.search import search as find_hits

    options = SearchOptions(threshold=threshold, offset=offset, distinct=distinct, exact=exact)
    query = read_query(context, text, texts=texts, images=images, file=query_file)
    if query and like is not None:
        fix = "Give a query or an id"
        raise RetrievalError("both a query and --like", place="vlduet search", fix=fix)
    with open_index(folder) as opened:
        if like is not None:
            hits = search_similar(opened, like, k=k, where=where, options=options)
        else:
            embedder = open_embedder(model or opened.model_path, check_golden="once")
            hits = find_hits(opened, embedder, query, k=k, where=where, options=options)
    if as_json:
        print_json({"index": str(folder), "hits": [hit_fields(hit) for hit in hits]})
    else:
        _print_hits(hits)


def check_index(
    folder: IndexFolder,
    *,
    sample: Annotated[int, typer.Option(min=1, help=SAMPLE)] = 100,
    as_json: Json = False,
) -> None:
    """Print how many of the 10 nearest documents the approximate search of INDEX finds.

    For a random sample of its documents, the neighbours that a search finds are compared with those
    of an exact search.
    """
    from dataclasses import asdict

    from vlduet.retrieval.recall import measure_recall

    with open_index(folder) as opened:
        report = measure_recall(opened, sample=sample)
    if as_json:
        print_json({"index": str(folder), **asdict(report)})
        return
    kind = "approximate" if report.is_approximate else "exact"
    print_text(
        f"{folder}: recall@{report.k} {report.recall:.3f} for {report.sample} of {report.count} "
        f"documents; searches are {kind}: {report.approximate_ms:.1f} ms, "
        f"with --exact {report.exact_ms:.1f} ms"
    )


class IndexCommand(TyperCommand):
    """Command ``vlduet index MODEL SOURCE``, which as ``vlduet index check`` is `check_index`.

    A model folder of the name ``check`` is written ``./check``.
    """

    def make_context(  # type: ignore[override]  # click passes no further arguments
        self, info_name: str | None, args: list[str], parent: Any = None
    ) -> Any:
        """Return the context of the command that the first word of `args` selects."""
        if args[:1] == ["check"]:
            checks = typer.Typer(rich_markup_mode=None, add_completion=False)
            checks.command()(check_index)
            command = typer.main.get_command(checks)
            return command.make_context(f"{info_name} check", args[1:], parent)
        return super().make_context(info_name, args, parent)


def ask(
    context: typer.Context,
    folder: IndexFolder,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", help=QUESTION)] = None,
    *,
    texts: Texts = None,
    images: Images = None,
    query_file: QueryFile = None,
    scope: Annotated[Literal["last", "dialog"], typer.Option(help=SCOPE)] = "last",
    k: Annotated[int, typer.Option("-k", min=1, help="References put in the prompt.")] = 3,
    where: Filters = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 128,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Print the answer to a question from the documents of an index, and its sources.

    The answer appears while it is generated, or with --json at the end together with the prompt. If
    no document matches, the model answers without sources. The errors are those of 'vlduet search'.
    """
    from vlduet.model.duet import DuetModel
    from vlduet.retrieval.rag import (
        as_conversation,
        check_question,
        format_source,
        prepare_prompt,
        stream_answer,
    )

    query = read_query(context, question, texts=texts, images=images, file=query_file)
    messages = as_conversation(query)
    check_question(messages)  # before the model is loaded, which takes seconds
    with open_index(folder) as opened:
        loaded = DuetModel.from_pretrained(model or opened.model_path)
        prompt = prepare_prompt(opened, loaded, messages, scope=scope, k=k, where=where)
    pieces = stream_answer(loaded, prompt, max_new_tokens=max_new_tokens)
    if as_json:
        answer = "".join(pieces).strip()
        sources = [hit_fields(hit) for hit in prompt.sources]
        print_json({"answer": answer, "sources": sources, "prompt": str(prompt)})
        return
    for piece in pieces:
        print_text(piece, end="")
    print_text(
        "\n\nSources:" if prompt.sources else "\n\nNo sources: nothing in the index matches."
    )
    for hit in prompt.sources:
        print_text(format_source(hit))


def open_index(folder: Path) -> Index:
    """Open an index for searching; log a warning if its last build did not finish.

    Raises RetrievalError if there is no index or it cannot be read. No model is checked.
    """
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.stores.lancedb_import import disable_pandas

    disable_pandas()
    opened = Index.open(folder)
    if not opened.manifest.complete:
        fix = "Run `vlduet index` again to complete it."
        logger.warning(f"{folder} is incomplete: its last build was interrupted. {fix}")
    return opened


def hit_fields(hit: Hit) -> dict[str, Any]:
    """Return a hit as JSON values; `p` is left out if it is not known."""
    fields = {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.id,
        "text": hit.text,
        "image": None if hit.image is None else hit.image.name,
        "metadata": dict(hit.metadata),
    }
    return fields if hit.p is None else {**fields, "p": hit.p}


def _print_hits(hits: list[Hit]) -> None:
    """Print hits as a table on a terminal, and as tab-separated lines otherwise.

    Columns are rank, score, id, text and image, and in the table p, if it is known. Cells of the
    table have 200 characters at most, and control characters become blanks. Without hits, a message
    is logged instead.
    """
    if not hits:
        logger.info("nothing in the index matches")
        return
    rows = []
    for hit in hits:
        fields = hit_fields(hit) | {"score": f"{hit.score:.3f}"}
        cells = [str(fields[name] or "") for name in ("rank", "score", "id", "text", "image")]
        rows.append(list(map(strip_control_characters, cells)))
    if not sys.stdout.isatty():
        for row in rows:
            print_text("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("rank", "score", "id", "text", "image")
    if any(hit.p is not None for hit in hits):
        table.add_column("p")
        for row, hit in zip(rows, hits, strict=True):
            row.append("" if hit.p is None else f"{hit.p:.2g}")
    for row in rows:
        shortened = [cell if len(cell) <= 200 else cell[:199] + "…" for cell in row]
        table.add_row(*[Text(cell, overflow="fold") for cell in shortened])
    Console().print(table)
