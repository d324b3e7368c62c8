"""Build an index or update one, in a single pass that may be interrupted anywhere and run again.

1. lock      allow one writer
2. protect   refuse what would overwrite documents of another source (`safeguards`)
3. read      read the documents, each with the hash of its content
4. compare   skip documents whose hashes equal those in the store
5. embed     embed content whose vector is nowhere in the index yet
6. commit    write chunk by chunk; each commit is durable
7. prune     on request, remove documents that the source no longer contains
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from vlduet.data.images import image_key, read_bytes
from vlduet.data.quarantine import Quarantine
from vlduet.data.readers.containers import is_pattern
from vlduet.data.readers.rows import IgnoredData
from vlduet.data.records import Place, Record
from vlduet.data.sources import RecordSource, SourceLike, as_source
from vlduet.errors import DataError, ImageError, RetrievalError, suggest_name
from vlduet.files import write_atomically
from vlduet.hub import resolve_dataset, resolve_model
from vlduet.locks import LOCK_NAME, lock_folder, remove_drafts
from vlduet.logs import track_progress
from vlduet.retrieval.documents import Document, Side, read_documents
from vlduet.retrieval.encode import DOCUMENTS_PER_CHUNK, Embedder, batched, encode_documents
from vlduet.retrieval.filter_upgrade import upgrade_filter_columns
from vlduet.retrieval.filter_values import FILTER_VERSION, extract_filter_values
from vlduet.retrieval.index import (
    IMAGE_FOLDER,
    MANIFEST_FILENAME,
    Index,
    IndexManifest,
    path_pair,
)
from vlduet.retrieval.safeguards import find_pruning_refusal, find_takeover_refusal
from vlduet.retrieval.source_state import SourceState
from vlduet.retrieval.stores.base import ApproximateMode, IndexRow, RowHashes


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a build proceeds where more than one way is right; `build_index` has the others."""

    force: bool = False
    """Prune although most documents or whole folders are absent, and let the source replace the
    documents of another source that have the same ids."""
    rehash: bool = False
    """Read all image files, also those that have not changed since the last build by their size,
    modification time and inode."""
    truncate: bool = False
    """Cut texts that are longer than the model's limit; without it they are left out."""
    ann: ApproximateMode | None = None
    """Whether to make an index for approximate search: "auto" for more than 100,000 documents. None
    does as the last build, and is "auto" for a new index."""


DEFAULT_OPTIONS = BuildOptions()
"""Options of a build without any."""


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Result of a build, counted in documents."""

    added: int
    updated: int
    """Documents whose content, text, metadata or image path changed."""
    kept: int
    """Documents that were in the index already, unchanged."""
    embedded: int
    """Documents that the model embedded; the vectors of other added and updated ones were known."""
    removed: int
    """Documents that `prune` removed."""
    absent: int
    """Documents of the index that the source no longer contains, and that `prune` would remove."""
    outdated: int
    """Documents of the index whose record or image could not be used now; they are as before."""
    other_sources: int
    """Documents of the index that came from other sources; they are as before."""
    quarantined: int
    """Records and documents that were left out."""
    unreadable: int
    """Files, folders and rows of the source among these that could not be read."""
    causes: dict[str, int]
    """Number of these by cause."""
    truncated: int
    """Documents that were written with a text that was cut at the model's limit."""
    count: int
    """Documents in the index after the build."""
    unread: dict[str, int]
    """Files and links in the source that are not read, by ending or kind."""
    system_files: dict[str, int]
    """Hidden files, thumbnails, recycle bins and the like in the source, by name."""
    remarks: list[str]
    """Sentences on `unread` and `system_files`."""

    @property
    def num_usable(self) -> int:
        """Documents of the source that are in the index after the build."""
        return self.added + self.updated + self.kept


def build_index(
    model: Embedder,
    source: SourceLike,
    *,
    to: Path | str,
    side: Side | None = None,
    prune: bool = False,
    model_path: Path | None = None,
    chunk_size: int = DOCUMENTS_PER_CHUNK,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> BuildReport:
    """Build an index, or update the existing one from its source; only new content is embedded.

    Writes the index folder, and in it `quarantine.jsonl` with every record that was left out. A
    progress bar is shown. A build that raises leaves the index open to searches and marked as
    incomplete in its manifest; what was committed stays, and the next build continues from there.

    Args:
        model: model that embeds.
        source: file of records, or folder of images, with any settings. Columns and the like that
            are not read are logged, files that are not read are in the report. Without any
            document, an empty index results.
        to: folder of the index; updated if it is an index already, created if it is missing.
        side: part of a record that is embedded: "image", "text" or "record". None keeps the side of
            an existing index and is "image" for a new one.
        prune: remove documents that came from this source and that it no longer contains. What is
            there and cannot be used now is not removed.
        model_path: folder of the model, stored so that `vlduet search` finds it.
        chunk_size: number of documents per commit; an interruption loses at most that much work.
        options: further options.

    Raises:
        LockError: another process is writing the index.
        ConfigError: the folder is a file.
        RetrievalError: another model or side built the index, the side is unknown, the folder is a
            broken index, or neither an index nor empty, the model returned a vector that is not
            finite, another source has documents of the same ids, so that nothing was changed, or
            documents are absent that must not be pruned; see `safeguards`.
        DataError: the source does not exist or cannot be read as a whole; or, if it is strict, it
            has a broken row or holds something that is not read.
    """
    path, source = Path(to), as_source(source)
    if not source.path.exists() and not is_pattern(source.path):
        fix = "Name a file of records or a folder of images"
        raise DataError("no such file or folder", place=source.path, fix=fix)
    with lock_folder(path):
        remove_drafts(path / IMAGE_FOLDER)
        previous = _read_or_create_manifest(path, model, side=side)
        source_path = resolve_dataset(source.path).resolve()
        manifest = replace(
            previous,
            source=previous.source or str(source_path),
            ann=options.ann or previous.ann,
            complete=False,
        )
        if model_path is not None:
            absolute, relative = path_pair(resolve_model(model_path), path)
            manifest = replace(manifest, model=absolute, model_relative=relative)
        manifest.write(path)
        state = SourceState(path, source_path, rehash=options.rehash)
        with state, Index(path, manifest, write=True) as index:
            job = _BuildJob(index, model, state, options=options)
            refusal = job.find_takeover_refusal(source)
            if refusal is None:
                manifest = index.manifest = replace(manifest, source=str(source_path))
                if manifest.filters < FILTER_VERSION:
                    upgrade_filter_columns(index.store, job.fields)
                job.run(source, chunk_size)
                refusal = job.find_prune_refusal(source_path) if prune else None
                report = job.finish(prune=prune and refusal is None)
                index.store.update_search_index(manifest.ann)
                manifest = replace(
                    manifest,
                    fields=job.fields,
                    filters=FILTER_VERSION,
                    count=report.count,
                    complete=True,
                )
            else:
                manifest = previous
        manifest.write(path)
        if refusal is not None:
            raise refusal
    return report


class _BuildJob:
    """State of one build of an index that is open for writing.

    Attributes:
        hashes: hashes of every stored row by id.
        row_by_content: id of a stored row for each content hash, whose vector can be reused.
        fields: kinds of values of each metadata key that can be filtered by.
        source_ids: ids of the documents that the source contains and that can be used.
        unusable_ids: ids of the documents that it contains and that cannot be read or embedded now.
        num_unreadable: rows, files and folders of the source that could not be read.
    """

    def __init__(self, index: Index, model: Embedder, state: SourceState, *, options: BuildOptions):
        """Read hashes and sources of all stored rows.

        Args:
            index: index that is open for writing; its manifest is not modified.
            model: model that embeds.
            state: what the index remembers of its sources.
            options: options of the build.
        """
        self.index, self.store, self.model, self.options = index, index.store, model, options
        self.state = state
        self.hashes = self.store.read_hashes()
        self.row_by_content = {h.content_hash: id_ for id_, h in self.hashes.items()}
        self.fields = {key: list(kinds) for key, kinds in index.manifest.fields.items()}
        state.load(self.hashes.keys(), last_source=index.manifest.source)
        self.stored_ids = frozenset(self.hashes)
        self.source_ids: set[str] = set()
        self.unusable_ids: set[str] = set()
        self.ignored = IgnoredData()
        self.num_added = self.num_updated = self.num_unchanged = 0
        self.num_embedded = self.num_unreadable = self.num_truncated = 0
        self.quarantine = Quarantine()

    def find_takeover_refusal(self, source: RecordSource) -> RetrievalError | None:
        """Return the error of a source that would overwrite documents of another one, or None."""
        return find_takeover_refusal(
            source,
            self.state,
            side=self.index.manifest.side,
            hashes=self.hashes,
            force=self.options.force,
        )

    def run(self, source: RecordSource, chunk_size: int) -> None:
        """Read `source`, embed what is new, and commit the changed documents chunk by chunk.

        The quarantine file of an earlier build is deleted first. Updates the attributes and the
        counts, and shows a progress bar. Broken records are quarantined. Raises DataError as
        `read_documents`, and RetrievalError for embeddings that are not finite; chunks that were
        committed before stay.
        """
        self.quarantine = Quarantine.create(self.index.path / "quarantine.jsonl")
        documents = read_documents(
            source,
            side=self.index.manifest.side,
            on_error=self._quarantine_record,
            hash_image=self.state.image_key,
            ignored=self.ignored,
        )
        changed = self._select_changed(track_progress(documents, label="index"))
        for chunk in batched(changed, chunk_size):
            self._commit_chunk(chunk)

    def _quarantine_record(self, record: Record | Place | str | None, error: Exception) -> None:
        """Count and list a record that is left out; None is a row that could not be read."""
        if record is None or isinstance(error, ImageError):
            self.num_unreadable += 1
        if isinstance(record, Record) and isinstance(error, ImageError):
            self.unusable_ids.add(record.id)
        self.quarantine.add(record, error)

    def _select_changed(self, documents: Iterator[Document]) -> Iterator[tuple[Document, IndexRow]]:
        """Yield new and changed documents in order, with their rows; count the unchanged ones.

        A document has changed if either hash of its row differs from the stored one. Adds the id of
        every document to `source_ids` and its metadata keys to `fields`; stores nothing.
        """
        for document in documents:
            self.source_ids.add(document.id)
            row = self._make_row(document)
            if self.hashes.get(document.id) == row.hashes:
                self.num_unchanged += 1
            else:
                yield document, row

    def _make_row(self, document: Document) -> IndexRow:
        """Return the row of a document without storing it; add its metadata keys to `fields`.

        Metadata values that JSON lacks become texts. An image that has no file of its own gets the
        path ``images/<SHA-256>`` in the index folder, where nothing is written yet.
        """
        metadata = json.loads(json.dumps(dict(document.metadata), default=str))
        image = document.image
        image_path = None if image is None else image.path
        if image is not None and image_path is None:
            # An image without a file of its own gets one in the index, written with the row.
            image_path = self.index.path / IMAGE_FOLDER / image_key(image)
        absolute, relative = path_pair(image_path, self.index.path)
        details = json.dumps([document.text, metadata, absolute], sort_keys=True)
        details_hash = hashlib.sha256(details.encode()).hexdigest()
        return IndexRow(
            id=document.id,
            hashes=RowHashes(document.content_hash, details_hash),
            text=document.text,
            image_path=absolute,
            relative_image_path=relative,
            metadata=metadata,
            filter_values=extract_filter_values(metadata, self.fields),
        )

    def _commit_chunk(self, chunk: list[tuple[Document, IndexRow]]) -> None:
        """Embed the new content of a chunk and write its rows in one commit.

        Equal content is embedded once. Images without files of their own are written to some, and
        all counts and hashes are updated. Documents that cannot be embedded are quarantined, not
        written, and moved from `source_ids` to `unusable_ids`. Raises RetrievalError, and writes
        nothing, for embeddings that are not finite.
        """
        vectors = self._read_known_vectors([document for document, _ in chunk])
        new_content: dict[str, Document] = {}
        for document, _ in chunk:
            if document.content_hash not in vectors:
                new_content.setdefault(document.content_hash, document)
        errors: dict[str, DataError] = {}

        def on_error(document: Document, error: DataError) -> None:
            errors[document.content_hash] = error

        cut: set[str] = set()

        def on_truncate(document: Document, num_tokens: int) -> None:
            cut.add(document.content_hash)

        for documents, embeddings in encode_documents(
            self.model,
            new_content.values(),
            on_error=on_error,
            on_truncate=on_truncate if self.options.truncate else None,
        ):
            vectors |= zip([d.content_hash for d in documents], embeddings, strict=True)
            self.num_embedded += len(documents)
        rows = []
        for document, row in chunk:
            if document.content_hash in errors:
                self._quarantine_record(
                    document.to_quarantine_record(), errors[document.content_hash]
                )
                self.source_ids.discard(document.id)
                self.unusable_ids.add(document.id)
            else:
                self._write_image_bytes(document, row)
                rows.append(row)
                self.num_truncated += document.content_hash in cut
        if rows:
            self.state.claim([row.id for row in rows])
            self.store.upsert(rows, np.stack([vectors[row.hashes.content_hash] for row in rows]))
            self.index.manifest.write(self.index.path)
        for row in rows:
            self._record_write(row.id, row.hashes)

    def _read_known_vectors(self, documents: list[Document]) -> dict[str, np.ndarray]:
        """Return the vectors, float32[D], of contents that the index holds, by content hash.

        Other contents are left out.
        """
        hashes = dict.fromkeys(document.content_hash for document in documents)
        stored = [content for content in hashes if content in self.row_by_content]
        vectors = self.store.read_vectors([self.row_by_content[content] for content in stored])
        return dict(zip(stored, vectors, strict=True))

    def _write_image_bytes(self, document: Document, row: IndexRow) -> None:
        """Write an image without a file of its own to the row's image path, and create the folder.

        Nothing is done for other documents, or if the file exists with these bytes.
        """
        image = document.image
        if image is None or image.path is not None or row.image_path is None:
            return
        path = Path(row.image_path)
        data = read_bytes(image)
        if not (path.is_file() and path.read_bytes() == data):
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, lambda file: file.write(data))

    def _record_write(self, row_id: str, hashes: RowHashes) -> None:
        """Count a written row as added or updated; update `hashes` and `row_by_content`."""
        previous = self.hashes.get(row_id)
        if previous is None:
            self.num_added += 1
        else:
            self.num_updated += 1
            # The old content's vector was overwritten, so it can no longer be read from this row.
            if self.row_by_content.get(previous.content_hash) == row_id:
                del self.row_by_content[previous.content_hash]
        self.hashes[row_id] = hashes
        self.row_by_content.setdefault(hashes.content_hash, row_id)

    def find_absent(self) -> list[str]:
        """Return the ids of stored documents that came from the source and are not in it."""
        known = self.source_ids | self.unusable_ids | self.state.foreign.keys()
        return sorted(self.hashes.keys() - known)

    def find_prune_refusal(self, source: Path) -> RetrievalError | None:
        """Return the error of a source by which nothing must be removed, or None.

        `source` is its absolute path.
        """
        return find_pruning_refusal(
            source,
            self.find_absent(),
            num_stored=len(self.stored_ids - self.state.foreign.keys()),
            num_usable=len(self.source_ids),
            num_unreadable=self.num_unreadable,
            listing=self.quarantine,
            force=self.options.force,
        )

    def finish(self, *, prune: bool) -> BuildReport:
        """Remove absent documents if `prune` is set, and return the report."""
        absent = self.find_absent()
        if prune:
            for ids in batched(absent, 1000):
                self.store.delete(ids)
                self.state.forget(ids)
            self.state.forget_missing_images()
        return BuildReport(
            added=self.num_added,
            updated=self.num_updated,
            kept=self.num_unchanged,
            embedded=self.num_embedded,
            removed=len(absent) if prune else 0,
            absent=0 if prune else len(absent),
            outdated=len(self.unusable_ids & self.stored_ids),
            other_sources=len(self.state.foreign),
            quarantined=self.quarantine.count,
            unreadable=self.num_unreadable,
            causes=self.quarantine.count_by_cause(),
            truncated=self.num_truncated,
            count=self.store.count(),
            unread=self.ignored.count_files(),
            system_files=self.ignored.count_system_files(),
            remarks=self.ignored.describe_files() + self.ignored.describe_system_files(),
        )


def _read_or_create_manifest(path: Path, model: Embedder, *, side: Side | None) -> IndexManifest:
    """Return the manifest of the index at `path`, or that of a new index if the folder is empty.

    No manifest is written. A new index has side "image" if `side` is None. The lock in the folder
    is ignored. Raises RetrievalError for an unknown side, a folder that is neither an index nor
    empty, a broken manifest, a damaged store, and an index of another model or side.
    """
    if side is not None and side not in get_args(Side):
        raise RetrievalError(f"'{side}'", place="--side", fix=suggest_name(side, get_args(Side)))
    if not (path / MANIFEST_FILENAME).exists():
        if any(file.name != LOCK_NAME for file in path.iterdir()):
            fix = "Name a new or an empty folder: --to DIR"
            raise RetrievalError("is not an index", place=path, fix=fix)
        return IndexManifest.for_new_index(model, side=side or "image")
    manifest = IndexManifest.read(path)
    manifest.verify_files(path)
    manifest.check_model(model, path)
    if side not in (None, manifest.side):
        message = f"built with --side {manifest.side}, not {side}"
        fix = "Leave --side out, or build a new index with --to"
        raise RetrievalError(message, place=path, fix=fix)
    return manifest
