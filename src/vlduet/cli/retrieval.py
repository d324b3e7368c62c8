"""The verbs that embed and find: index, search, ask, encode."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from vlduet.logs import logger, strip_control_characters

if TYPE_CHECKING:
    from vlduet.retrieval.index import Index
    from vlduet.retrieval.search import Hit

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SIDE = "What of a record is embedded: image, text or record (all of it)."
WHERE = "Filter on metadata: key=value, key!=value, key<value, 'key in a,b'. May be repeated; all must hold."
MODEL = "The model's folder, where the index cannot find it."

IndexFolder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index's folder.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder.")]
Source = Annotated[
    Path, typer.Argument(metavar="SOURCE", help="A file of records, or a folder of images.")
]
ImageFile = Annotated[
    Path | None, typer.Option("--image", metavar="FILE", help="An image, part of the query.")
]
Filters = Annotated[list[str] | None, typer.Option("--where", metavar="CONDITION", help=WHERE)]
OtherModel = Annotated[Path | None, typer.Option("--model", metavar="DIR", help=MODEL)]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("index")(index)
    app.command("search")(search)
    app.command("ask")(ask)
    app.command("encode")(encode)


def index(
    model: ModelFolder,
    source: Source,
    *,
    to: Annotated[
        Path,
        typer.Option("--to", metavar="INDEX", help="The index's folder, new or to be updated."),
    ],
    side: Annotated[str | None, typer.Option(help=f"{SIDE} A new index's default: image.")] = None,
    store: Annotated[
        str | None, typer.Option(help="lance (a new index's default) or flat.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what the source no longer holds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Embed SOURCE into an index; run it again after an interruption or a change: only new content is embedded."""
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.build import build_index

    report = build_index(
        open_embedder(model),
        source,
        to=to,
        side=cast("Any", side),
        store=cast("Any", store),
        prune=prune,
        model_path=model,
    )
    if as_json:
        _print_json({"index": str(to), **asdict(report)})
        return
    done = {
        "added": report.added,
        "updated": report.updated,
        "kept": report.kept,
        "removed": report.removed,
    }
    told = ", ".join(f"{count} {name}" for name, count in done.items() if count)
    print(f"{to}: {report.count} documents ({told or 'nothing to do'})")
    if report.quarantined:
        print(f"{report.quarantined} left out: see {to / 'quarantine.jsonl'}")
    if report.absent:
        print(f"{report.absent} are no longer in the source: --prune removes them")


def search(
    folder: IndexFolder,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to look for.")] = None,
    *,
    image: ImageFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits wanted.")] = 10,
    where: Filters = None,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Find what is nearest to a text, an image, or both."""
    from vlduet.encoders.dual import open_embedder
    from vlduet.retrieval.search import search as find

    with _open(folder) as opened:
        query = tuple(part for part in (_image(image), text) if part is not None)
        hits = find(opened, open_embedder(model or opened.model_path), query, k=k, where=where)
    if as_json:
        _print_json({"index": str(folder), "hits": [_hit(hit) for hit in hits]})
    else:
        _print_hits(hits)


def ask(
    folder: IndexFolder,
    question: Annotated[str, typer.Argument(help="What to answer.")],
    *,
    image: ImageFile = None,
    k: Annotated[int, typer.Option("-k", min=1, help="References put in the prompt.")] = 3,
    where: Filters = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    model: OtherModel = None,
    as_json: Json = False,
) -> None:
    """Answer a question with what the index holds, and name the sources."""
    from vlduet.model.duet import DuetModel
    from vlduet.retrieval.rag import format_source, prepare_prompt, stream_answer

    with _open(folder) as opened:
        loaded = DuetModel.from_pretrained(model or opened.model_path)
        prompt = prepare_prompt(opened, loaded, question, image=_image(image), k=k, where=where)
    pieces = stream_answer(loaded, prompt, max_new_tokens=max_new_tokens)
    if as_json:
        sources = [_hit(hit) for hit in prompt.sources]
        _print_json({"answer": "".join(pieces).strip(), "sources": sources, "prompt": str(prompt)})
        return
    for piece in pieces:
        sys.stdout.write(strip_control_characters(piece, keep="\n"))
        sys.stdout.flush()
    print("\n\nSources:" if prompt.sources else "\n\nNo sources: nothing in the index matches.")
    for hit in prompt.sources:
        print(strip_control_characters(format_source(hit)))


def encode(
    model: ModelFolder,
    source: Source,
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.npz", help="Gets ids and float32 unit vectors.")
    ],
    side: Annotated[str, typer.Option(help=SIDE)] = "image",
    as_json: Json = False,
) -> None:
    """Write embeddings for an index of your own."""
    import numpy as np

    from vlduet.data.quarantine import Quarantine, quarantine_path
    from vlduet.encoders.dual import open_embedder
    from vlduet.errors import RetrievalError
    from vlduet.logs import track_progress
    from vlduet.retrieval.documents import read_documents
    from vlduet.retrieval.encode import encode_documents, write_vectors

    dropped = Quarantine.create(quarantine_path(out))
    found = track_progress(
        read_documents(source, side=cast("Any", side), on_error=dropped.add), label="encode"
    )
    ids, vectors = [], []
    encoded = encode_documents(
        open_embedder(model),
        found,
        on_error=lambda d, error: dropped.add(d.to_quarantine_record(), error),
    )
    for group, embedded in encoded:
        ids += [document.id for document in group]
        vectors.append(embedded)
    if not ids:
        raise RetrievalError(
            f"nothing to embed ({dropped})", place=source, fix="Mend the source, or change --side"
        )
    write_vectors(out, ids=ids, vectors=np.concatenate(vectors))
    dim = vectors[0].shape[1]
    if as_json:
        _print_json({"out": str(out), "count": len(ids), "dim": dim, "quarantined": dropped.count})
        return
    print(f"{out}: {len(ids)} vectors of {dim} numbers")
    if dropped.count:
        print(f"{dropped.count} left out: see {quarantine_path(out)}")


def _open(folder: Path) -> Index:
    from vlduet.retrieval.index import Index

    opened = Index.open(folder)
    if not opened.manifest.complete:
        logger.info(
            f"{folder} is incomplete: its last build was interrupted. Run `vlduet index` again, it resumes."
        )
    return opened


def _image(path: Path | None) -> Any:
    from vlduet.data.records import ImageRef

    return None if path is None else ImageRef(path=path)


def _hit(hit: Hit) -> dict[str, Any]:
    image = None if hit.image is None else hit.image.name
    found = {"rank": hit.rank, "score": hit.score, "id": hit.id, "text": hit.text, "image": image}
    return {**found, "metadata": dict(hit.metadata)}


def _print_json(value: dict[str, Any]) -> None:
    # ASCII: no byte of a document reaches the terminal as it is.
    print(json.dumps(value, indent=2))


def _print_hits(hits: list[Hit]) -> None:
    """A table for people; tab-separated lines for pipes."""
    if not hits:
        logger.info("nothing in the index matches")
        return
    columns = ["rank", "score", "id", "text", "image"]
    rows = [
        [strip_control_characters(str(_hit(hit)[name] or "")) for name in columns] for hit in hits
    ]
    for row, hit in zip(rows, hits, strict=True):
        row[1] = f"{hit.score:.3f}"
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(
            *[Text(cell if len(cell) <= 200 else cell[:199] + "…", overflow="fold") for cell in row]
        )
    Console().print(table)
