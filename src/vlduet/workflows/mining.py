"""Hard negatives: candidates that a model takes for right, and that are not.

1. read       pairs and retrieval records as queries (`data.tools.queries`)
2. embed      every distinct query and candidate once; the vectors stay on disk, so that an
              interrupted run continues
3. rank       the candidates of the same modalities as the positives (text, image or both) by cosine
4. leave out  what is right: known positives by content, and whatever scores higher than the lowest
              positive minus a margin
5. write      the records with the nearest k of the others as negatives

Step 4 is the positive-aware mining of NV-Retriever (arXiv 2407.15831), its TopK-MarginPos: a
candidate as near as the positive is more often right and not labelled than wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlduet.data import jsonl_output
from vlduet.data.content_keys import content_key
from vlduet.data.quarantine import Quarantine, bisect_failures
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.data.sources import SourceLike, as_source
from vlduet.data.tools.queries import QuerySide, get_query_and_positives, split_into_queries
from vlduet.errors import ConfigError, DataError
from vlduet.logs import ProgressBar, track_progress
from vlduet.model.limits import log_truncation
from vlduet.retrieval.documents import Document, hash_parts
from vlduet.retrieval.encode import DOCUMENTS_PER_CHUNK, Embedder, batched, check_vectors
from vlduet.retrieval.stores.base import IndexRow, RowHashes

ScoreMatrix = NDArray[np.float64]

QUERIES_PER_BLOCK = 256
"""Number of queries whose scores are in memory at once."""
SCORE_DECIMALS = 6
"""Decimals to which cosines are rounded before they are compared."""


@dataclass(frozen=True, slots=True)
class MiningReport:
    """Counts of one run. The field names are the keys of ``--json``."""

    records: int
    """Written records."""
    negatives: int
    """New negatives of all records together."""
    without: int
    """Records that received no new negative."""
    too_near: int
    """Candidates that the margin left out, of all records together."""
    embedded: int
    """Queries and candidates that were embedded in this run; the others' vectors were on disk."""
    positive_score: float | None
    """Mean cosine of a query and its lowest positive."""
    negative_score: float | None
    """Mean cosine of a query and a new negative; None without any."""
    dropped: int
    """Records that were left out, listed in the quarantine."""
    causes: dict[str, int]
    """Number of dropped records by cause."""


@dataclass(frozen=True, slots=True)
class _MiningQuery:
    """A record with the content keys of its query and candidates."""

    record: Record
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def mine_hard_negatives(
    model: Embedder,
    source: SourceLike,
    *,
    output: Path,
    query_side: QuerySide = "image",
    num_negatives: int = 4,
    margin: float = 0.05,
) -> MiningReport:
    """Write the records of `source` with the negatives that `model` finds hardest.

    Pairs that are queried by their image stay pairs, with their long caption; all others become
    retrieval records. Equal runs write equal files: equal scores are taken in the order of the
    file. Vectors stay in ``<stem of output>.vectors/<fingerprint of model>/`` by content, so that a
    second run with another `num_negatives` or `margin` embeds nothing. The quarantine of an earlier
    run is deleted. Progress is logged.

    Args:
        model: model to embed with: the one that is to be trained, or a better one.
        source: pairs with short captions, and retrieval records, which are also the candidates.
        output: ``.jsonl`` to write, complete or not at all; records that are left out are listed in
            ``<stem of output>.quarantine.jsonl``. Images without files of their own are written to
            ``<stem of output>-images/``.
        query_side: side of a pair that is the query.
        num_negatives: number of new negatives per record; fewer, or none, if the file has no more.
        margin: cosine by which a negative must stay below the lowest positive of the record.

    Raises:
        ConfigError: an option is out of range.
        DataError: the source has no usable record, or `output` is not a valid target; or as
            `RecordSource.read`.
        LockError: another process is writing `output`.
        RetrievalError: the stored vectors are broken, or the model gives one that is not finite.
    """
    if num_negatives < 1:
        raise ConfigError(f"{num_negatives} negatives", place="-k", fix="Ask for 1 or more")
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError(f"{margin}", place="--margin", fix="Give a cosine difference, 0 or more")
    source = as_source(source)
    with jsonl_output.lock_jsonl_output(output, source.path) as quarantine:
        pool = _CandidatePool()
        records = source.read(on_error=lambda e: quarantine.add(e.place, e))
        for record in track_progress(records, label=f"reading {source.path.name}"):
            try:
                for query in split_into_queries(record, query_side=query_side):
                    pool.add(query)
            except DataError as error:
                quarantine.add(record, error)
        folder = output.with_suffix(".vectors") / model.fingerprint
        num_embedded = pool.embed(model, folder, quarantine)
        if not pool.queries:
            message = f"no usable record ({quarantine})"
            raise DataError(message, place=source.path, fix="Give pairs or retrieval records")
        positive_scores: list[float] = []
        negative_scores: list[float] = []
        num_without = 0
        mined = pool.add_negatives(k=num_negatives, margin=margin, model_name=model.fingerprint)
        stored = jsonl_output.stream_to_jsonl(mined, output)
        for record in track_progress(stored, total=len(pool.queries), label="ranking"):
            origin = record.metadata["mined"]
            positive_scores.append(origin["positive_score"])
            negative_scores += origin["negative_scores"]
            num_without += not origin["negative_scores"]
        return MiningReport(
            records=len(positive_scores),
            negatives=len(negative_scores),
            without=num_without,
            too_near=pool.num_too_near,
            embedded=num_embedded,
            positive_score=float(np.mean(positive_scores)),
            negative_score=float(np.mean(negative_scores)) if negative_scores else None,
            dropped=quarantine.count,
            causes=quarantine.count_by_cause(),
        )


class _CandidatePool:
    """Queries of a file, with every distinct query and candidate content to embed.

    Contents are distinguished by `content_key`, as the losses do.
    """

    def __init__(self) -> None:
        """Start without queries. `add` fills the pool; `embed` then sets the vectors."""
        self.queries: list[_MiningQuery] = []
        self.query_documents: dict[str, Document] = {}
        self.candidates: dict[str, Document] = {}
        # Positives of an equal query in any record: the loss counts all of them as right.
        self.positives: dict[str, set[str]] = {}
        self.query_vectors: ScoreMatrix = np.empty((0, 0))  # [N, D]
        self.candidate_vectors: ScoreMatrix = np.empty((0, 0))  # [C, D]
        self.num_too_near = 0  # candidates that the margin left out

    def add(self, record: Record) -> None:
        """Add a record of `split_into_queries`: its positives and negatives become candidates.

        Contents that the pool has already are not stored again. The query itself is no candidate,
        and positives of records with an equal query are united.

        Raises:
            ImageError: an image cannot be read; the pool is not changed then.
        """
        query_parts, positive_parts = get_query_and_positives(record)
        query, query_document = _make_document(record, query_parts)
        positives = dict(_make_document(record, parts) for parts in positive_parts)
        negatives = dict(_make_document(record, parts) for parts in record.negative)
        self.query_documents.setdefault(query, query_document)
        for key, document in (positives | negatives).items():
            self.candidates.setdefault(key, document)
        self.positives.setdefault(query, set()).update(positives)
        self.queries.append(_MiningQuery(record, query, tuple(positives), tuple(negatives)))

    def embed(self, model: Embedder, folder: Path, quarantine: Quarantine) -> int:
        """Set `query_vectors` and `candidate_vectors`, in the order of their documents.

        Vectors are read from the stores ``queries`` and ``candidates`` in `folder`, and missing
        ones are added there. Documents that cannot be embedded, and the queries that need them,
        leave the pool; each such query is listed in `quarantine`. Progress is logged.

        Returns:
            Number of documents that were not stored in `folder` yet.

        Raises:
            RetrievalError: a store is broken, or the model gives a vector that is not finite.
        """
        with log_truncation("mining") as on_truncate:  # training cuts these texts as well
            self.query_vectors, num_queries, query_errors = _embed_documents(
                partial(model.encode_query, on_truncate=on_truncate),
                model.dim,
                self.query_documents,
                folder / "queries",
            )
            self.candidate_vectors, num_candidates, errors = _embed_documents(
                partial(model.encode_document, on_truncate=on_truncate),
                model.dim,
                self.candidates,
                folder / "candidates",
            )
        usable = []
        for query in self.queries:
            keys = [key for key in query.positives + query.negatives if key in errors]
            if query.query in query_errors:
                quarantine.add(query.record, query_errors[query.query])
            elif keys:
                quarantine.add(query.record, errors[keys[0]])
            else:
                usable.append(query)
        self.queries = usable
        return num_queries + num_candidates

    def add_negatives(self, *, k: int, margin: float, model_name: str) -> Iterator[Record]:
        """Yield a copy of the record of every query with its new negatives, in their order.

        Up to `k` negatives are appended to those that the record has, the hardest first. They have
        the modalities of the first positive, are no known positive or negative of the query, and
        their rounded cosine is below that of the lowest positive minus `margin`; candidates that
        fail the last condition alone are added to `num_too_near`. ``metadata["mined"]`` tells
        model, margin and scores, also without a new negative. `embed` must have been called.
        """
        row_of = {key: i for i, key in enumerate(self.query_documents)}
        column_of = {key: i for i, key in enumerate(self.candidates)}
        candidates = [document.parts for document in self.candidates.values()]
        modalities = np.array([_describe_modalities(parts) for parts in candidates])  # [C]
        for block in batched(self.queries, QUERIES_PER_BLOCK):
            query_vectors = self.query_vectors[[row_of[query.query] for query in block]]
            # Rounded float64, so that equal contents tie exactly, whatever the blocks or the
            # machine.
            cosines = np.round(query_vectors @ self.candidate_vectors.T, SCORE_DECIMALS)  # [B, C]
            lowest = np.empty(len(block))  # [B], cosine of the lowest positive
            allowed = np.empty(cosines.shape, dtype=bool)  # [B, C]
            for i, query in enumerate(block):
                positives = [column_of[key] for key in query.positives]
                lowest[i] = cosines[i, positives].min()
                allowed[i] = modalities == modalities[positives[0]]
                labelled = self.positives[query.query].union(query.negatives)
                allowed[i, [column_of[key] for key in labelled if key in column_of]] = False
            limits = np.round(lowest - margin, SCORE_DECIMALS)  # [B]
            self.num_too_near += int((allowed & (cosines >= limits[:, None])).sum())
            selected = select_hardest(cosines, allowed=allowed, limits=limits, k=k)
            for i, columns in enumerate(selected):
                record = block[i].record
                origin = {
                    "model": model_name,
                    "margin": margin,
                    "positive_score": float(lowest[i]),
                    "negative_scores": [float(cosines[i, column]) for column in columns],
                }
                negative = (*record.negative, *(candidates[column] for column in columns))
                metadata = {**record.metadata, "mined": origin}
                yield replace(record, negative=negative, metadata=metadata)


def _make_document(record: Record, parts: Parts) -> tuple[str, Document]:
    """Return the content key of some parts of a record, and the document to embed.

    The hash of the document, unlike the key, tells upper from lower case. Raises ImageError if an
    image cannot be read.
    """
    content_hash = hash_parts(parts)
    document = Document(record.id, parts, "", content_hash=content_hash, place=record.place)
    return content_key(parts), document


def _embed_documents(
    encode: Callable[[list[Parts]], np.ndarray],
    dim: int,
    documents: dict[str, Document],
    folder: Path,
) -> tuple[ScoreMatrix, int, dict[str, DataError]]:
    """Embed the documents whose vectors are not stored in `folder` yet, and store them there.

    Progress is logged.

    Args:
        encode: returns the unit vectors of some parts, float32[N, dim].
        documents: documents by key. Those for which `encode` raises DataError are removed in place.
        folder: folder of the vector store; created if it is missing.

    Returns:
        (vectors float64[N, D] in the order of `documents`, number of new ones, errors of the
        removed documents by key).

    Raises:
        RetrievalError: the store is broken, or the model gives a vector that is not finite.
    """
    from vlduet.retrieval.stores.lance import LanceStore  # slow to import

    store = LanceStore(folder, dim=dim, write=True)
    stored = set(store.read_hashes())
    num_new = 0
    errors: dict[str, DataError] = {}  # by content hash

    def encode_chunk(chunk: list[Document]) -> np.ndarray:
        return check_vectors(encode([document.parts for document in chunk]), chunk)

    def add_error(document: Document, error: DataError) -> None:
        errors[document.content_hash] = error

    with ProgressBar(total=len(documents), label=f"embedding {folder.name}") as bar:
        # By position, so that a continued run makes the same batches, and so the same vectors, as
        # one without interruption.
        for chunk in batched(documents.values(), DOCUMENTS_PER_CHUNK):
            missing = [document for document in chunk if document.content_hash not in stored]
            vectors = bisect_failures(encode_chunk, missing, on_error=add_error)
            new = [
                (_make_row(document.content_hash), vector)
                for document, vector in zip(missing, vectors, strict=True)
                if vector is not None
            ]
            if new:
                store.upsert([row for row, _ in new], np.stack([vector for _, vector in new]))
            stored.update(row.id for row, _ in new)
            num_new += len(new)
            bar.advance(len(chunk))
    failed = {
        key: errors[document.content_hash]
        for key, document in documents.items()
        if document.content_hash in errors
    }
    for key in failed:
        del documents[key]
    matrix = store.read_vectors([document.content_hash for document in documents.values()])
    store.close()
    return matrix.astype(np.float64), num_new, failed


def _make_row(content_hash: str) -> IndexRow:
    """Return a row of the vector store that has no content but its id, `content_hash`."""
    return IndexRow(content_hash, RowHashes(content_hash, ""), "", None, None, {})


def select_hardest(
    scores: ScoreMatrix, *, allowed: NDArray[np.bool_], limits: ScoreMatrix, k: int
) -> list[list[int]]:
    """Return the columns of the k highest allowed scores below each row's limit, the best first.

    Equal scores are taken in the order of the columns.

    Args:
        scores: float[Q, C].
        allowed: bool[Q, C].
        limits: float[Q]; a score must be lower than its row's limit.

    Returns:
        Q lists of at most k columns; fewer, or none, if a row has no more. NaN is never taken.
    """
    selected = []
    for row, eligible in zip(scores, allowed & (scores < limits[:, None]), strict=True):
        columns = np.flatnonzero(eligible)
        if len(columns) > k:
            kth_score = np.partition(row[columns], -k)[-k]
            columns = columns[row[columns] >= kth_score]  # ties included, for the stable sort
        best_first = columns[np.argsort(-row[columns], kind="stable")][:k]
        selected.append([int(column) for column in best_first])
    return selected


def _describe_modalities(parts: Parts) -> str:
    """Return ``image``, ``text`` or ``image+text``."""
    names = {"image" if isinstance(part, ImageRef) else "text" for part in parts}
    return "+".join(sorted(names))
