"""Judgement of scores: how many unrelated pairs of a query and a document have at least this one.

`measure_score_statistics` compares the contents of records that do not belong together; a training
run does so with its validation records and stores the result with the model. `judge_hits` then
gives every hit its `p`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vlduet.data.content_keys import content_key
from vlduet.data.quarantine import Quarantine, bisect_failures
from vlduet.data.records import Message, Part, Parts, Record
from vlduet.errors import DataError
from vlduet.logs import logger
from vlduet.model.limits import TruncationCallback, log_truncation
from vlduet.model.score_statistics import (
    CONTENT_KINDS,
    ContentKind,
    ScoreDistribution,
    ScoreStatistics,
)
from vlduet.retrieval.documents import Side, split_record
from vlduet.retrieval.encode import DOCUMENTS_PER_CHUNK, Embedder, batched

if TYPE_CHECKING:
    from vlduet.retrieval.search import Hit

MAX_CALIBRATION_RECORDS = 512
"""Largest number of records whose contents are compared with each other."""
SIDE_BY_KIND: dict[ContentKind, Side] = {"text": "text", "image": "image", "both": "record"}
"""Side of a record that has the contents of a type."""


def sample_records(records: Iterable[Record]) -> list[Record]:
    """Return up to `MAX_CALIBRATION_RECORDS` of the records at random, always the same ones.

    All records are read, but only as many are kept. They are not the first ones, because files are
    often sorted, and neighbours then resemble each other.
    """
    generator = random.Random(0)
    kept: list[Record] = []
    for position, record in enumerate(records):
        if len(kept) < MAX_CALIBRATION_RECORDS:
            kept.append(record)
        elif (place := generator.randrange(position + 1)) < MAX_CALIBRATION_RECORDS:
            kept[place] = record
    return kept


def measure_score_statistics(model: Embedder, records: Sequence[Record]) -> ScoreStatistics | None:
    """Return the distributions of the scores of unrelated contents; None if there are no pairs.

    Args:
        model: the model, whose mode is restored.
        records: records that it was not trained on; the first `MAX_CALIBRATION_RECORDS` are used.
    """
    records = records[:MAX_CALIBRATION_RECORDS]
    scores = score_unrelated_pairs(model, records)
    distributions = {key: ScoreDistribution.from_scores(values) for key, values in scores.items()}
    return ScoreStatistics(len(records), distributions) if distributions else None


def score_unrelated_pairs(
    model: Embedder, records: Sequence[Record]
) -> dict[tuple[ContentKind, ContentKind], np.ndarray]:
    """Return the scores of all pairs of unrelated contents by the types of query and document.

    From each record come up to three contents: its first text, its first image, and what side
    "record" embeds if that has both. Each of them, embedded as a query, is compared with those of
    all other records, embedded as documents. Two records are related, and left out, if they share a
    text (see `content_keys.text_key`) or an image.

    Contents that the model cannot embed are left out, and their number is logged. Texts beyond the
    model's limit are cut, and their number is logged.

    Returns:
        float32[N] for every two types that have pairs. The order of the pairs has no meaning.
    """
    contents = [_list_contents(record) for record in records]
    unrelated = _find_unrelated(records)  # [N, N]
    vectors = {}
    with log_truncation("statistics of scores") as on_truncate:
        for kind in CONTENT_KINDS:
            contents_of_kind = [content.get(kind) for content in contents]
            vectors[kind] = _embed_kind(model, contents_of_kind, on_truncate)
    scores_by_type = {}
    for query in CONTENT_KINDS:
        for document in CONTENT_KINDS:
            query_rows, query_vectors, _ = vectors[query]
            document_rows, _, document_vectors = vectors[document]
            scores = query_vectors @ document_vectors.T  # [Q, D]
            pairs = scores[unrelated[np.ix_(query_rows, document_rows)]]
            if len(pairs):
                scores_by_type[query, document] = pairs
    return scores_by_type


def _list_contents(record: Record) -> dict[ContentKind, Parts]:
    """Return the first content of each type that a record has."""
    contents: dict[ContentKind, Parts] = {}
    for kind, side in SIDE_BY_KIND.items():
        try:
            parts = split_record(record, side)[0].parts
        except DataError:  # it has nothing on this side
            continue
        if find_content_kind(parts) == kind:
            contents[kind] = parts
    return contents


def find_content_kind(parts: Sequence[Part | Message]) -> ContentKind | None:
    """Return the type of a content of at least one part; None for a conversation.

    A conversation is rendered as a chat, with which no content of a calibration was compared.
    """
    if any(isinstance(part, Message) for part in parts):
        return None
    has_text = any(isinstance(part, str) for part in parts)
    has_image = any(not isinstance(part, str) for part in parts)
    return "both" if has_text and has_image else "text" if has_text else "image"


def _find_unrelated(records: Sequence[Record]) -> np.ndarray:
    """Return bool[N, N], True where two records have no text and no image in common."""
    unrelated = ~np.eye(len(records), dtype=bool)
    rows_by_key: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        keys = set()
        for side in ("text", "image"):
            try:
                keys |= {content_key(document.parts) for document in split_record(record, side)}
            except DataError:  # nothing on this side, or an image that cannot be read
                continue
        for key in keys:
            rows_by_key.setdefault(key, []).append(row)
    for rows in rows_by_key.values():
        unrelated[np.ix_(rows, rows)] = False
    return unrelated


def _embed_kind(
    model: Embedder, contents: Sequence[Parts | None], on_truncate: TruncationCallback
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the embeddings of contents of one type as queries and as documents.

    Args:
        model: the model.
        contents: content of each record; None where it has none.
        on_truncate: allows texts to be cut.

    Returns:
        The positions of the contents that could be embedded, int[M], and float32[M, E] twice. Both
        are the same array if the model treats the first content as a query as it does as a
        document.
    """
    rows = [row for row, parts in enumerate(contents) if parts is not None]
    dropped = Quarantine()

    def embed(chunk: list[int], as_query: bool = False) -> np.ndarray:
        encode = model.encode_query if as_query else model.encode_document
        return encode([contents[row] or () for row in chunk], on_truncate=on_truncate)

    kept: list[int] = []
    vectors: list[np.ndarray] = []
    for chunk in batched(rows, DOCUMENTS_PER_CHUNK):
        for row, vector in zip(
            chunk,
            bisect_failures(embed, chunk, on_error=lambda row, e: dropped.add(str(row), e)),
            strict=True,
        ):
            if vector is not None:
                kept.append(row)
                vectors.append(vector)
    if dropped.count:
        logger.info(f"statistics of scores: {dropped}")
    if not kept:
        nothing = np.empty((0, model.dim), dtype=np.float32)
        return [], nothing, nothing
    documents = np.stack(vectors)
    first = kept[:1]
    if np.array_equal(embed(first), embed(first, as_query=True)):
        return kept, documents, documents
    queries = [embed(chunk, as_query=True) for chunk in batched(kept, DOCUMENTS_PER_CHUNK)]
    return kept, np.concatenate(queries), documents


def judge_hits(
    hits: Sequence[Hit],
    statistics: ScoreStatistics | None,
    *,
    query: ContentKind | None,
    side: Side,
) -> list[Hit]:
    """Return copies of hits with `p`, which is None without statistics for their types.

    Args:
        hits: result of a search.
        statistics: those of the model of the index.
        query: type of the query; None for one that the statistics do not cover.
        side: side of the records that the index holds. A document of side "record" with an image
            counts as "both" if it has a text, and else as "image".
    """
    if statistics is None or query is None:
        return list(hits)
    return [
        replace(
            hit,
            p=statistics.share_at_least(
                hit.score, query=query, document=_find_document_kind(hit, side)
            ),
        )
        for hit in hits
    ]


def _find_document_kind(hit: Hit, side: Side) -> ContentKind:
    """Return the type of what was embedded of a hit's document."""
    if side != "record":
        return side
    if hit.image is None:
        return "text"
    return "both" if hit.text else "image"
