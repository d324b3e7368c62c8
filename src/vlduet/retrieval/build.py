"""Build an index, or bring one up to date: one pass that may stop anywhere and be started again.

1. lock      one writer
2. read      documents, each with the hash of its content
3. compare   with the stamps in the store: equal ones are done
4. embed     content whose vector is nowhere in the index yet
5. commit    chunk by chunk, each durable
6. prune     on request, what the source no longer holds
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from filelock import FileLock, Timeout

from vlduet.data.quarantine import Quarantine
from vlduet.data.records import ImageRef, Place, Record
from vlduet.errors import DataError, RetrievalError, suggest_name
from vlduet.files import write_atomically
from vlduet.logs import track_progress
from vlduet.retrieval.documents import Document, Side, read_documents
from vlduet.retrieval.encode import DOCUMENTS_PER_CHUNK, Embedder, batched, encode_documents
from vlduet.retrieval.filters import Scalar, scalar_kind, to_scalar
from vlduet.retrieval.index import (
    MANIFEST_FILENAME,
    Index,
    IndexManifest,
    StoreKind,
    absolute_and_relative_path,
)
from vlduet.retrieval.stores.base import IndexRow, RowHashes

MAX_FILTER_KEYS = 64
"""Metadata keys that can be filtered by; those beyond the first so many are kept and shown only."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did, counted in documents."""

    added: int
    updated: int
    """Their content, text, metadata or path changed."""
    kept: int
    embedded: int
    """Forwards of the model; the other added and updated documents had content that the index knew."""
    removed: int
    absent: int
    """No longer in the source, yet still in the index: `prune` removes them."""
    quarantined: int
    count: int
    """In the index now."""


def build_index(
    model: Embedder,
    source: Path | str,
    *,
    to: Path | str,
    side: Side | None = None,
    store: StoreKind | None = None,
    prune: bool = False,
    model_path: Path | None = None,
    chunk_size: int = DOCUMENTS_PER_CHUNK,
) -> BuildReport:
    """Make an index, or bring one up to date with its source.

    Args:
        model: embeds.
        source: a file of records, or a folder of images.
        to: the index folder; extended where there is one.
        side: what of a record is embedded: "image" (a new index's default), "text" or "record".
        store: "lance" (a new index's default) or "flat".
        prune: remove what the source no longer holds.
        model_path: remembered, so that a search needs no `--model`.
        chunk: documents a commit; an interruption loses at most one chunk's work.

    Raises:
        RetrievalError: another writer, another model, a folder that is no index.
        DataError: the source as a whole cannot be read.
    """
    path, source = Path(to), Path(source)
    if not source.exists():
        raise DataError(
            "no such file or folder",
            place=source,
            fix="Name a file of records or a folder of images",
        )
    with _writing(path):
        manifest = replace(
            _prepare(path, model, side=side, store=store), source=str(source.resolve())
        )
        if model_path is not None:
            absolute, relative = absolute_and_relative_path(model_path, path)
            manifest = replace(manifest, model=absolute, model_relative=relative)
        replace(manifest, complete=False).write(path)
        with Index(path, manifest, write=True) as index:
            job = _Build(index, model)
            job.run(source, chunk_size)
            report = job.finish(prune)
        replace(manifest, fields=job.fields, count=report.count, complete=True).write(path)
    return report


class _Build:
    """The state of one build: what the store holds, what was seen, and what was done."""

    def __init__(self, index: Index, model: Embedder):
        self.index, self.store, self.model = index, index.store, model
        self.stamps = self.store.read_hashes()
        # A row that has this content, by the content's hash.
        self.homes = {stamp.content_hash: identity for identity, stamp in self.stamps.items()}
        self.fields = {key: list(kinds) for key, kinds in index.manifest.fields.items()}
        self.seen: set[str] = set()
        self.added = self.updated = self.kept = self.embedded = self.unread = 0
        self.quarantine = Quarantine.create(index.path / "quarantine.jsonl")

    def run(self, source: Path, chunk: int) -> None:
        """Read, compare, embed, commit."""
        found = read_documents(source, side=self.index.manifest.side, on_error=self.drop)
        for group in batched(self.changed(track_progress(found, label="index")), chunk):
            self.commit(group)

    def drop(self, what: Record | Place | str | None, error: Exception) -> None:
        """Left out of the index; a row that could not be read may be of any document."""
        self.unread += what is None
        self.quarantine.add(what, error)

    def changed(self, found: Iterator[Document]) -> Iterator[tuple[Document, IndexRow]]:
        """The documents that the store does not hold as they are."""
        for document in found:
            self.seen.add(document.id)
            row = self.row(document)
            if self.stamps.get(document.id) == row.hashes:
                self.kept += 1
            else:
                yield document, row

    def row(self, document: Document) -> IndexRow:
        """What is stored of a document."""
        metadata = json.loads(json.dumps(dict(document.metadata), default=str))
        absolute, relative = absolute_and_relative_path(
            self.image_path(document.image), self.index.path
        )
        told = json.dumps([document.text, metadata, absolute], sort_keys=True)
        stamp = RowHashes(document.content_hash, hashlib.sha256(told.encode()).hexdigest())
        filters = {
            key: value for key, raw in metadata.items() if (value := to_scalar(raw)) is not None
        }
        filters = {key: value for key, value in filters.items() if self.know(key, value)}
        return IndexRow(document.id, stamp, document.text, absolute, relative, metadata, filters)

    def image_path(self, image: ImageRef | None) -> Path | None:
        """The file of an image; one that came as bytes gets a place in the index, named by its content."""
        if image is None or image.data is None:
            return None if image is None else image.path
        return self.index.path / "images" / hashlib.sha256(image.data).hexdigest()

    def know(self, key: str, value: Scalar) -> bool:
        """Note that `key` can be filtered by, as far as there is room."""
        if key not in self.fields and len(self.fields) >= MAX_FILTER_KEYS:
            return False
        kinds = self.fields.setdefault(key, [])
        if scalar_kind(value) not in kinds:
            kinds.append(scalar_kind(value))
        return True

    def commit(self, group: list[tuple[Document, IndexRow]]) -> None:
        """Embed what is new in a chunk and write all of it."""
        known = {
            d.content_hash: self.homes[d.content_hash]
            for d, _ in group
            if d.content_hash in self.homes
        }
        vectors = dict(zip(known, self.store.read_vectors(list(known.values())), strict=True))
        failed: dict[str, DataError] = {}
        new: dict[str, Document] = {}
        for document, _ in group:
            if document.content_hash not in known:
                new.setdefault(document.content_hash, document)
        encoded = encode_documents(
            self.model,
            new.values(),
            on_error=lambda d, error: failed.update({d.content_hash: error}),
        )
        for done, found in encoded:
            vectors |= {d.content_hash: vector for d, vector in zip(done, found, strict=True)}
            self.embedded += len(done)
        ready = []
        for document, row in group:
            if document.content_hash in failed:
                self.quarantine.add(document.to_quarantine_record(), failed[document.content_hash])
                self.seen.discard(document.id)
            else:
                self.keep_bytes(document, row)
                ready.append(row)
        if ready:
            self.store.upsert(ready, np.stack([vectors[row.hashes.content_hash] for row in ready]))
        for row in ready:
            self.place(row.id, row.hashes)

    def keep_bytes(self, document: Document, row: IndexRow) -> None:
        """An image without a file gets one."""
        if document.image is None or document.image.data is None or row.image_path is None:
            return
        path, data = Path(row.image_path), document.image.data
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda file: file.write(data))

    def place(self, identity: str, stamp: RowHashes) -> None:
        """Note a row that was written."""
        before = self.stamps.get(identity)
        self.added, self.updated = (
            self.added + (before is None),
            self.updated + (before is not None),
        )
        if before is not None and self.homes.get(before.content_hash) == identity:
            del self.homes[before.content_hash]
        self.stamps[identity] = stamp
        self.homes.setdefault(stamp.content_hash, identity)

    def finish(self, prune: bool) -> BuildReport:
        """Prune and count."""
        absent = sorted(self.stamps.keys() - self.seen)
        if prune and absent and (self.unread or not self.seen):
            read = (
                f"{self.unread} rows of the source cannot be read"
                if self.unread
                else "nothing in the source can be indexed"
            )
            fix = f"Mend the source ({self.quarantine}), or delete the index"
            raise RetrievalError(f"{read}, so nothing is pruned", place=self.index.path, fix=fix)
        if prune:
            for group in batched(absent, 1000):
                self.store.delete(group)
        return BuildReport(
            added=self.added,
            updated=self.updated,
            kept=self.kept,
            embedded=self.embedded,
            removed=len(absent) if prune else 0,
            absent=0 if prune else len(absent),
            quarantined=self.quarantine.count,
            count=self.store.count(),
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Hold the index's lock; the system lets go of it when the process dies, however it dies."""
    if path.exists() and not path.is_dir():
        raise RetrievalError("is a file", place=path, fix="Name a new or an empty folder: --to DIR")
    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            yield
    except Timeout:
        raise RetrievalError(
            "another process is writing this index", place=path, fix="Wait for it to end"
        ) from None


def _prepare(
    path: Path, model: Embedder, *, side: Side | None, store: StoreKind | None
) -> IndexManifest:
    """The manifest of the index at `path`, checked; or that of a new one."""
    for name, value, known in (
        ("--side", side, get_args(Side)),
        ("--store", store, get_args(StoreKind)),
    ):
        if value is not None and value not in known:
            raise RetrievalError(f"'{value}'", place=name, fix=suggest_name(value, known))
    if not (path / MANIFEST_FILENAME).exists():
        if any(file.name != ".lock" for file in path.iterdir()):
            raise RetrievalError(
                "is not an index", place=path, fix="Name a new or an empty folder: --to DIR"
            )
        return IndexManifest.for_new_index(model, store=store or "lance", side=side or "image")
    manifest = IndexManifest.read(path)
    manifest.check_model(model, path)
    for name, wanted, there in (("side", side, manifest.side), ("store", store, manifest.store)):
        if wanted not in (None, there):
            fix = f"Leave --{name} out, or build a new index with --to"
            raise RetrievalError(f"built with --{name} {there}, not {wanted}", place=path, fix=fix)
    return manifest
