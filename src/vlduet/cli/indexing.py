"""`vlduet index` and `encode`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

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

if TYPE_CHECKING:
    from vlduet.retrieval.build import BuildReport

TO = "Folder of the index; updated if it exists."
SIDE = "Part of a record that is embedded: image, text or record (all of it)."
TRUNCATE = "Cut texts that are longer than the model's limit, instead of leaving them out."
PRUNE = "Remove documents that the source no longer contains."
ANN = "Approximate search: auto (above 100,000 documents), on or off."

Truncate = Annotated[bool, typer.Option("--truncate", help=TRUNCATE)]


def index(
    model: ModelFolder,
    source: Source,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="INDEX", help=TO)],
    side: Annotated[str | None, typer.Option(help=f"{SIDE} A new index: image.")] = None,
    store: Annotated[str | None, typer.Option(hidden=True)] = None,
    prune: Annotated[bool, typer.Option("--prune", help=PRUNE)] = False,
    truncate: Truncate = False,
    ann: Annotated[Literal["auto", "on", "off"], typer.Option(help=ANN)] = "auto",
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
    from vlduet.retrieval.build import BuildOptions, build_index

    if store not in (None, "lance"):
        fix = "Leave --store out: every index is stored in LanceDB"
        raise RetrievalError(f"'{store}'", place="--store", fix=fix)
    embedder = open_embedder(model)
    report = build_index(
        embedder,
        make_source(source, format=format, root=root, columns=columns, strict=strict),
        to=to,
        side=cast("Any", side),
        prune=prune,
        model_path=model,
        options=BuildOptions(truncate=truncate, ann=ann),
    )
    if as_json:
        print_json({"index": str(to), **asdict(report)})
    else:
        _print_build_report(report, source, to, max_tokens=embedder.max_text_tokens)
    if report.quarantined and not report.count:
        raise typer.Exit(1)


def encode(
    model: ModelFolder,
    source: Source,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.npz", help="Ids and float32 unit vectors.")
    ],
    side: Annotated[str, typer.Option(help=SIDE)] = "image",
    truncate: Truncate = False,
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
    from vlduet.model.limits import TOO_LONG, format_truncation
    from vlduet.retrieval.documents import Document, read_documents
    from vlduet.retrieval.encode import encode_documents, write_vectors

    truncated: list[str] = []

    def on_truncate(document: Document, num_tokens: int) -> None:
        truncated.append(document.id)

    with lock_output(out):
        dropped = Quarantine.create(quarantine_path(out))
        records = make_source(source, format=format, root=root, columns=columns, strict=strict)
        documents = read_documents(records, side=cast("Any", side), on_error=dropped.add)
        embedder = open_embedder(model)
        encoded = encode_documents(
            embedder,
            track_progress(documents, label="encode"),
            on_error=lambda document, error: dropped.add(document.to_quarantine_record(), error),
            on_truncate=on_truncate if truncate else None,
        )
        ids, chunks = [], []
        for chunk, vectors in encoded:
            ids += [document.id for document in chunk]
            chunks.append(vectors)
        if not ids:
            fix = "Repair the source, or change --side"
            if TOO_LONG in dropped.count_by_cause():
                fix = "Allow texts to be cut (--truncate), or shorten or split them"
            raise RetrievalError(f"nothing to embed ({dropped})", place=source, fix=fix)
        embeddings = np.concatenate(chunks)  # [N, D]
        write_vectors(out, ids=ids, vectors=embeddings)
    dim = embeddings.shape[1]
    if as_json:
        counts = {"count": len(ids), "dim": dim, "quarantined": dropped.count}
        counts["truncated"] = len(truncated)
        print_json({"out": str(out), **counts})
        return
    print_text(f"{out}: {len(ids)} vectors of {dim} numbers")
    if truncated:
        print_text(format_truncation(len(truncated), max_tokens=embedder.max_text_tokens))
    if dropped.count:
        print_text(format_left_out(dropped.count_by_cause(), source, listing=quarantine_path(out)))


def _print_build_report(report: BuildReport, source: Path, to: Path, *, max_tokens: int) -> None:
    """Print the numbers of documents of a build, why others were left out, and what is absent.

    `max_tokens` is the model's limit, at which texts were cut.
    """
    from vlduet.model.limits import format_truncation

    changes = []
    for name in ("added", "updated", "kept", "removed"):
        if count := getattr(report, name):
            changes.append(f"{count} {name}")
    print_text(f"{to}: {report.count} documents ({', '.join(changes) or 'nothing to do'})")
    if report.truncated:
        print_text(format_truncation(report.truncated, max_tokens=max_tokens))
    if report.quarantined:
        print_text(format_left_out(report.causes, source, listing=to / "quarantine.jsonl"))
    if report.absent:
        print_text(f"{report.absent} are no longer in the source: --prune removes them")
