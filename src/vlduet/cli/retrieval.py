"""`vlduet index`, `search`, `ask` and `encode`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vlduet.cli._common import (
    Columns,
    Format,
    Json,
    ModelFolder,
    Root,
    Source,
    Strict,
    format_left_out,
    make_source,
    print_json,
    print_text,
)
from vlduet.logs import logger, strip_control_characters

if TYPE_CHECKING:
    from vlduet.data.records import ImageRef
    from vlduet.retrieval.build import BuildReport
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import Hit

TO = "Folder of the index; updated if it exists."
SIDE = "Part of a record that is embedded: image, text or record (all of it)."
PRUNE = "Remove documents that the source no longer contains."
WHERE = "Filter on metadata: key=value, key!=value, key<value, 'key in a,b'. Repeat it to combine."
MODEL = "Folder of the model, if the index cannot find it."

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="Folder of the index.")]
ImageFile = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", help="An image, part of the query.")
]
Filters = Annotated[list[str] | None, typer.Option("--where", metavar="CONDITION", help=WHERE)]
OtherModel = Annotated[Path | None, typer.Option("--model", metavar="DIR", help=MODEL)]


def index(
    model: ModelFolder,
    source: Source,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="INDEX", help=TO)],
    side: Annotated[str | None, typer.Option(help=f"{SIDE} A new index: image.")] = None,
    store: Annotated[str | None, typer.Option(hidden=True)] = None,
    prune: Annotated[bool, typer.Option("--prune", help=PRUNE)] = False,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Embed SOURCE into an index, or update the index; only new content is embedded.

    Prints the numbers of documents. Records that cannot be used are left out and listed in
    INDEX/quarantine.jsonl; the exit status is 1 if none remains. An interrupted build continues
    when it is started again. An index of another model or --side is an error, and so is any --store
    but lance.
    """
    from vlduet.encoders.dual import open_embedder
    from vlduet.errors import RetrievalError
    from vlduet.retrieval.build import build_index

    if store not in (None, "lance"):
        fix = "Leave --store out: every index is stored in LanceDB"
        raise RetrievalError(f"'{store}'", place="--store", fix=fix)
    report = build_index(
        open_embedder(model),
        make_source(source, format=format, root=root, columns=columns, strict=strict),
        to=to,
        side=cast("Any", side),
        prune=prune,
        model_path=model,
    )
    if as_json:
        print_json({"index": str(to), **asdict(report)})
    else:
        _print_build_report(report, source, to)
    if report.quarantined and not report.count:
        raise typer.Exit(1)


def _print_build_report(report: BuildReport, source: Path, to: Path) -> None:
    """Print the numbers of documents of a build, why others were left out, and what is absent."""
    changes = []
    for name in ("added", "updated", "kept", "removed"):
        if count := getattr(report, name):
            changes.append(f"{count} {name}")
    print_text(f"{to}: {report.count} documents ({', '.join(changes) or 'nothing to do'})")
    if report.quarantined:
        print_text(format_left_out(report.causes, source, listing=to / "quarantine.jsonl"))
    if report.absent:
        print_text(f"{report.absent} are no longer in the source: --prune removes them")


def search(
    folder: IndexFolder,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Text of the query.")] = None,
    *,
    image: ImageFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    where: Filters = None,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Print the documents that are nearest to a text, an image, or both, the best first.

    The output is a table on a terminal and tab-separated lines elsewhere. An empty query, a model
    that did not build the index, and a filter on metadata that no document has are errors.
    """
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.search import search as find_hits

    with _open_index(folder) as opened:
        query = tuple(part for part in (_image_ref(image), text) if part is not None)
        embedder = open_embedder(model or opened.model_path)
        hits = find_hits(opened, embedder, query, k=k, where=where)
    if as_json:
        print_json({"index": str(folder), "hits": [_hit_fields(hit) for hit in hits]})
    else:
        _print_hits(hits)


def ask(
    folder: IndexFolder,
    question: Annotated[str, typer.Argument(help="The question.")],
    *,
    image: ImageFile = None,
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
    from vlduet.retrieval.rag import format_source, prepare_prompt, stream_answer

    with _open_index(folder) as opened:
        loaded = DuetModel.from_pretrained(model or opened.model_path)
        prompt = prepare_prompt(opened, loaded, question, image=_image_ref(image), k=k, where=where)
    texts = stream_answer(loaded, prompt, max_new_tokens=max_new_tokens)
    if as_json:
        answer = "".join(texts).strip()
        sources = [_hit_fields(hit) for hit in prompt.sources]
        print_json({"answer": answer, "sources": sources, "prompt": str(prompt)})
        return
    for text in texts:
        print_text(text, end="")
    print_text(
        "\n\nSources:" if prompt.sources else "\n\nNo sources: nothing in the index matches."
    )
    for hit in prompt.sources:
        print_text(format_source(hit))


def encode(
    model: ModelFolder,
    source: Source,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.npz", help="Ids and float32 unit vectors.")
    ],
    side: Annotated[str, typer.Option(help=SIDE)] = "image",
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Write the embeddings of SOURCE to a file, for an index of another program.

    FILE.npz holds ids and vectors in the order of SOURCE; an existing file is replaced. Documents
    that cannot be embedded are left out and listed in FILE.quarantine.jsonl. It is an error if none
    remains.
    """
    import numpy as np

    from vlduet.data.quarantine import Quarantine, quarantine_path
    from vlduet.encoders.dual import open_embedder
    from vlduet.errors import RetrievalError
    from vlduet.locks import lock_output
    from vlduet.logs import track_progress
    from vlduet.retrieval.documents import read_documents
    from vlduet.retrieval.encode import encode_documents, write_vectors

    with lock_output(out):
        dropped = Quarantine.create(quarantine_path(out))
        records = make_source(source, format=format, root=root, columns=columns, strict=strict)
        documents = read_documents(records, side=cast("Any", side), on_error=dropped.add)
        encoded = encode_documents(
            open_embedder(model),
            track_progress(documents, label="encode"),
            on_error=lambda document, error: dropped.add(document.to_quarantine_record(), error),
        )
        ids, chunks = [], []
        for chunk, vectors in encoded:
            ids += [document.id for document in chunk]
            chunks.append(vectors)
        if not ids:
            fix = "Repair the source, or change --side"
            raise RetrievalError(f"nothing to embed ({dropped})", place=source, fix=fix)
        embeddings = np.concatenate(chunks)  # [N, D]
        write_vectors(out, ids=ids, vectors=embeddings)
    dim = embeddings.shape[1]
    if as_json:
        counts = {"count": len(ids), "dim": dim, "quarantined": dropped.count}
        print_json({"out": str(out), **counts})
        return
    print_text(f"{out}: {len(ids)} vectors of {dim} numbers")
    if dropped.count:
        print_text(format_left_out(dropped.count_by_cause(), source, listing=quarantine_path(out)))


def _open_index(folder: Path) -> Index:
    """Open an index for searching; log a warning if its last build did not finish.

    Raises RetrievalError if there is no index or it cannot be read. No model is checked.
    """
    from vlduet.retrieval.index import Index

    opened = Index.open(folder)
    if not opened.manifest.complete:
        fix = "Run `vlduet index` again to complete it."
        logger.warning(f"{folder} is incomplete: its last build was interrupted. {fix}")
    return opened


def _image_ref(path: Path | None) -> ImageRef | None:
    from vlduet.data.records import ImageRef

    return None if path is None else ImageRef(path=path)


def _hit_fields(hit: Hit) -> dict[str, Any]:
    """Return a hit as JSON values."""
    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.id,
        "text": hit.text,
        "image": None if hit.image is None else hit.image.name,
        "metadata": dict(hit.metadata),
    }


def _print_hits(hits: list[Hit]) -> None:
    """Print hits as a table on a terminal, and as tab-separated lines otherwise.

    Columns are rank, score, id, text and image; cells of the table have 200 characters at most, and
    control characters become blanks. Without hits, a message is logged instead.
    """
    if not hits:
        logger.info("nothing in the index matches")
        return
    rows = []
    for hit in hits:
        fields = _hit_fields(hit) | {"score": f"{hit.score:.3f}"}
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
    for row in rows:
        shortened = [cell if len(cell) <= 200 else cell[:199] + "…" for cell in row]
        table.add_row(*[Text(cell, overflow="fold") for cell in shortened])
    Console().print(table)
