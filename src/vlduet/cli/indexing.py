"""`vlduet index` and `encode`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from vlduet.logs import logger

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlduet.data.quarantine import Quarantine
    from vlduet.data.readers.rows import IgnoredData
    from vlduet.data.sources import RecordSource
    from vlduet.retrieval.build import BuildReport
    from vlduet.retrieval.encode import Embedder

TO = "Folder of the index; updated if it exists."
SIDE = "Part of a record that is embedded: image, text or record (all of it)."
TRUNCATE = "Cut texts that are longer than the model's limit, instead of leaving them out."
PRUNE = "Remove documents that the source no longer contains, if all of it can be read."
FORCE = "Prune most documents too; replace documents of another source with the same ids."
REHASH = "Read all image files, also those of unchanged size, time and inode."
ANN = (
    "Approximate search: auto (above 100,000 documents), on or off; later updates keep it. "
    "A new index: auto. 'vlduet index check INDEX' measures what it finds."
)

Truncate = Annotated[bool, typer.Option("--truncate", help=TRUNCATE)]


def index(
    model: ModelFolder,
    source: Source,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="INDEX", help=TO)],
    side: Annotated[str | None, typer.Option(help=f"{SIDE} A new index: image.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help=PRUNE)] = False,
    force: Annotated[bool, typer.Option("--force", help=FORCE)] = False,
    rehash: Annotated[bool, typer.Option("--rehash", help=REHASH)] = False,
    truncate: Truncate = False,
    ann: Annotated[Literal["auto", "on", "off"] | None, typer.Option(help=ANN)] = None,
    store: Annotated[Literal["lance", "flat"] | None, typer.Option(hidden=True)] = None,
    format: Format = None,
    root: Root = None,
    columns: Columns = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Embed SOURCE into an index, or update the index; only new content is embedded.

    Prints the numbers of documents, and of files that are not read. Records that cannot be used are
    left out and listed in INDEX/quarantine.jsonl; the exit status is 1 if none of SOURCE can be
    used. An interrupted build continues when it is started again. An index of another model or
    --side is an error.
    """
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.build import BuildOptions, build_index

    if store is not None:  # scripts for earlier versions have it
        logger.warning("--store has no effect: every index is stored by LanceDB")
    embedder = open_embedder(model)
    report = build_index(
        embedder,
        make_source(source, format=format, root=root, columns=columns, strict=strict),
        to=to,
        side=cast("Any", side),
        prune=prune,
        model_path=model,
        options=BuildOptions(force=force, rehash=rehash, truncate=truncate, ann=ann),
    )
    if as_json:
        print_json({"index": str(to), **asdict(report)})
    else:
        _print_build_report(report, source, to, max_tokens=embedder.max_text_tokens)
    if not report.num_usable:
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
    from vlduet.data.quarantine import Quarantine, quarantine_path
    from vlduet.encoders.dual import open_embedder
    from vlduet.errors import RetrievalError
    from vlduet.locks import lock_output
    from vlduet.model.limits import TOO_LONG, format_truncation
    from vlduet.retrieval.encode import write_vectors

    with lock_output(out):
        dropped = Quarantine.create(quarantine_path(out))
        records = make_source(source, format=format, root=root, columns=columns, strict=strict)
        embedder = open_embedder(model)
        encoding = _encode_records(embedder, records, dropped, side=side, truncate=truncate)
        if not encoding.ids:
            fix = "Repair the source, or change --side"
            if TOO_LONG in dropped.count_by_cause():
                fix = "Allow texts to be cut (--truncate), or shorten or split them"
            raise RetrievalError(f"nothing to embed ({dropped})", place=source, fix=fix)
        write_vectors(out, ids=encoding.ids, vectors=encoding.vectors)
    count, dim = encoding.vectors.shape
    ignored = encoding.ignored
    if as_json:
        counts = {"count": count, "dim": dim, "quarantined": dropped.count}
        counts["truncated"] = encoding.num_truncated
        unread = {"unread": ignored.count_files(), "system_files": ignored.count_system_files()}
        print_json({"out": str(out), **counts, **unread})
        return
    print_text(f"{out}: {count} vectors of {dim} numbers")
    if encoding.num_truncated:
        print_text(format_truncation(encoding.num_truncated, max_tokens=embedder.max_text_tokens))
    if dropped.count:
        print_text(format_left_out(dropped.count_by_cause(), source, listing=quarantine_path(out)))
    for remark in ignored.describe_files() + ignored.describe_system_files():
        print_text(remark)


@dataclass(slots=True)
class _Encoding:
    """Embeddings of a source, and what was not embedded as a whole."""

    ids: list[str]
    vectors: NDArray[np.float32]
    """float32[N, D] in the order of `ids`; float32[0, 0] without any."""
    num_truncated: int
    ignored: IgnoredData


def _encode_records(
    model: Embedder, records: RecordSource, dropped: Quarantine, *, side: str, truncate: bool
) -> _Encoding:
    """Return the embeddings of a source; what cannot be embedded is added to `dropped`."""
    import numpy as np

    from vlduet.data.readers.rows import IgnoredData
    from vlduet.logs import track_progress
    from vlduet.retrieval.documents import Document, read_documents
    from vlduet.retrieval.encode import encode_documents

    encoding = _Encoding([], np.empty((0, 0), dtype=np.float32), 0, IgnoredData())

    def on_truncate(document: Document, num_tokens: int) -> None:
        encoding.num_truncated += 1

    documents = read_documents(
        records, side=cast("Any", side), on_error=dropped.add, ignored=encoding.ignored
    )
    chunks = []
    for chunk, vectors in encode_documents(
        model,
        track_progress(documents, label="encode"),
        on_error=lambda document, error: dropped.add(document.to_quarantine_record(), error),
        on_truncate=on_truncate if truncate else None,
    ):
        encoding.ids += [document.id for document in chunk]
        chunks.append(vectors)
    if chunks:
        encoding.vectors = np.concatenate(chunks)
    return encoding


def _print_build_report(report: BuildReport, source: Path, to: Path, *, max_tokens: int) -> None:
    """Print the numbers of documents of a build, why others were left out, and what is absent.

    `max_tokens` is the model's limit, at which texts were cut.
    """
    from vlduet.model.limits import format_truncation

    changes = []
    for name in ("added", "updated", "kept", "removed"):
        if count := getattr(report, name):
            changes.append(f"{count} {name}")
    if not report.num_usable:
        changes.append(f"nothing in {source} could be indexed")
    print_text(f"{to}: {report.count} documents ({', '.join(changes)})")
    if report.truncated:
        print_text(format_truncation(report.truncated, max_tokens=max_tokens))
    if report.quarantined:
        print_text(format_left_out(report.causes, source, listing=to / "quarantine.jsonl"))
    if report.outdated:
        print_text(f"{report.outdated} of these were indexed before, and stay as they were")
    for remark in report.remarks:
        print_text(remark)
    if report.absent and report.unreadable:
        print_text(f"{report.absent} more were not in what could be read of the source")
    elif report.absent:
        print_text(f"{report.absent} are no longer in the source: --prune removes them")
    if report.other_sources:
        print_text(f"{report.other_sources} came from other sources, and stay as they were")
