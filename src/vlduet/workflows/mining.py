"""Hard negatives: what a model takes for right and is not.

1. read       pairs and retrieval records as questions (`data.questions`)
2. embed      every distinct query and candidate once; the vectors are kept, so an interrupted run goes on
3. rank       the candidates that are made of what the right answers are made of (text, image or both), by cosine
4. leave out  what is right: known answers by content, and whatever scores higher than the positive minus a margin
5. write      the records with the k nearest of the rest

Step 4 is the "positive-aware" mining of NV-Retriever (arXiv 2407.15831), its TopK-MarginPos: a candidate that the
model puts as near as the right answer is more often right and not labelled than wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlduet.data import formats
from vlduet.data.content_keys import content_key
from vlduet.data.quarantine import Quarantine, quarantine_path
from vlduet.data.questions import QuerySide, get_query_and_positives, split_into_queries
from vlduet.data.records import ImageRef, Parts, Record
from vlduet.errors import ConfigError, DataError
from vlduet.logs import ProgressBar, track_progress
from vlduet.retrieval.documents import Document, hash_parts
from vlduet.retrieval.encode import DOCUMENTS_PER_CHUNK, Embedder, batched, encode_documents
from vlduet.retrieval.stores.base import FlatStore, IndexRow, RowHashes

ScoreMatrix = NDArray[np.float64]

QUERIES_PER_BLOCK = 256
"""Questions whose scores are in memory at a time."""
SCORE_DECIMALS = 6
"""Cosines are compared to so many decimals."""


@dataclass(frozen=True, slots=True)
class MiningReport:
    """What a run found."""

    records: int
    negatives: int
    """New ones, over all records."""
    without: int
    """Records that got none."""
    too_near: int
    """Candidates that were left out because of the margin, over all records."""
    embedded: int
    """Queries and candidates that went through the model; the others' vectors were there."""
    positive_score: float | None
    """Mean cosine of a query and its lowest positive."""
    negative_score: float | None
    """Mean cosine of a query and a new negative; None where there is none."""
    dropped: int
    causes: dict[str, int]


def mine_hard_negatives(
    model: Embedder,
    source: Path,
    *,
    output: Path,
    query_side: QuerySide = "image",
    num_negatives: int = 4,
    margin: float = 0.05,
) -> MiningReport:
    """Write the records of `source` with the negatives that `model` finds hardest: pairs that ask with their image stay
    pairs, long caption and all; the rest is retrieval records.

    Deterministic: equal scores are taken in the order of the file. Vectors are kept in ``<to>.vectors/``, by model and
    content; a second run with another `k` or `margin` embeds nothing.

    Args:
        model: embeds; the model that is to be trained, or a better one.
        source: pairs with short captions and retrieval records; the candidates are what they hold.
        to: the ``.jsonl`` to write, whole or not at all; what is left out is listed in ``<to>.quarantine.jsonl``.
        asking: the side of a pair that is the query.
        k: new negatives a record; fewer where the file has no more.
        margin: cosine by which a negative must stay below the lowest of the record's positives.

    Raises:
        ConfigError: a bad option. DataError: a source without a usable record. RetrievalError: broken vectors.
    """
    if num_negatives < 1:
        raise ConfigError(f"{num_negatives} negatives", place="-k", fix="Ask for 1 or more")
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError(f"{margin}", place="--margin", fix="Give a cosine difference, 0 or more")
    formats.check_output_path(output, source)
    dropped = Quarantine.create(quarantine_path(output))
    pool = _Pool()
    records = formats.read_records(source, on_error=lambda error: dropped.add(error.place, error))
    for record in track_progress(records, label=f"reading {source.name}"):
        try:
            for question in split_into_queries(record, query_side=query_side):
                pool.add(question)
        except DataError as error:
            dropped.add(record, error)
    embedded = pool.embed(model, output.with_suffix(".vectors") / model.fingerprint, dropped)
    if not pool.asked:
        raise DataError(
            f"no usable record ({dropped})", place=source, fix="Give pairs or retrieval records"
        )
    found: list[_Found] = []
    mined = _mined(pool, k=num_negatives, margin=margin, made_by=model.fingerprint, found=found)
    for _ in track_progress(
        formats.stream_to_jsonl(mined, output), total=len(pool.asked), label="ranking"
    ):
        pass
    scores = [score for one in found for score in one.scores]
    return MiningReport(
        records=len(found),
        negatives=len(scores),
        without=sum(not one.scores for one in found),
        too_near=sum(one.too_near for one in found),
        embedded=embedded,
        positive_score=_mean([one.positive for one in found]),
        negative_score=_mean(scores),
        dropped=dropped.count,
        causes=dropped.count_by_cause(),
    )


def select_hardest(
    scores: ScoreMatrix, *, allowed: NDArray[np.bool_], limits: ScoreMatrix, k: int
) -> list[list[int]]:
    """The k highest allowed scores below each row's limit, best first, ties in the order of the columns.

    Args:
        scores: float[Q, C]; allowed: bool[Q, C]; limits: float[Q], which a score must stay below.
    """
    found = []
    for row, eligible in zip(scores, allowed & (scores < limits[:, None]), strict=True):
        at = np.flatnonzero(eligible)
        if len(at) > k:
            at = at[row[at] >= np.partition(row[at], -k)[-k]]
        found.append([int(i) for i in at[np.argsort(-row[at], kind="stable")][:k]])
    return found


@dataclass(frozen=True, slots=True)
class _Question:
    """A record, and the contents of its parts."""

    record: Record
    query: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found for one question."""

    positive: float
    scores: tuple[float, ...]
    """Of its new negatives."""
    too_near: int


class _Pool:
    """Every question, and every distinct query and candidate, by content as the losses compare it."""

    def __init__(self) -> None:
        self.asked: list[_Question] = []
        self.queries: dict[str, Document] = {}
        self.candidates: dict[str, Document] = {}
        # What is paired with an equal query in any record: the loss takes all of that for right.
        self.right: dict[str, set[str]] = {}

    def add(self, record: Record) -> None:
        """Raises ImageError for an image that cannot be read; nothing of the record is kept then."""
        asking, answers = get_query_and_positives(record)
        query, document = _keyed(record, asking)
        right, wrong = (
            dict(_keyed(record, parts) for parts in side) for side in (answers, record.negative)
        )
        self.queries.setdefault(query, document)
        for key, document in (right | wrong).items():
            self.candidates.setdefault(key, document)
        self.right.setdefault(query, set()).update(right)
        self.asked.append(_Question(record, query, tuple(right), tuple(wrong)))

    def embed(self, model: Embedder, folder: Path, dropped: Quarantine) -> int:
        """Set `vectors`, of queries and of candidates; questions with a part that cannot be embedded leave the pool.

        Returns:
            How many went through the model.
        """
        asking, new_queries, bad_queries = _embed(_Asked(model), self.queries, folder / "queries")
        answers, new_candidates, bad_candidates = _embed(
            model, self.candidates, folder / "candidates"
        )
        kept = []
        for question in self.asked:
            errors = [bad_candidates.get(key) for key in question.positive + question.negative]
            error = next(
                (e for e in [bad_queries.get(question.query), *errors] if e is not None), None
            )
            if error is None:
                kept.append(question)
            else:
                dropped.add(question.record, error)
        self.asked, self.vectors = kept, (asking, answers)
        return new_queries + new_candidates


class _Asked:
    """A model whose documents are queries, for `encode_documents`."""

    def __init__(self, model: Embedder):
        self.fingerprint, self.image_backend, self.dim = (
            model.fingerprint,
            model.image_backend,
            model.dim,
        )
        self.encode_query = self.encode_document = model.encode_query


def _keyed(record: Record, parts: Parts) -> tuple[str, Document]:
    """Content as the losses compare it, and what is embedded of it, whose own key tells upper from lower case too."""
    return content_key(parts), Document(
        record.id, parts, "", content_hash=hash_parts(parts), place=record.place
    )


def _embed(
    model: Embedder, documents: dict[str, Document], folder: Path
) -> tuple[ScoreMatrix, int, dict[str, DataError]]:
    """Embed what does not lie in `folder` yet; what cannot be embedded leaves `documents`.

    Returns:
        float[N, D] in the order of `documents`; how many are new; errors of what left, by content.
    """
    store = FlatStore(folder, dim=model.dim, write=True)
    known, new, failed = set(store.read_hashes()), 0, dict[str, DataError]()
    with ProgressBar(total=len(documents), label=f"embedding {folder.name}") as bar:
        # By position, so that a run that goes on makes the same batches, and so the same vectors, as one without a stop.
        for group in batched(documents.values(), DOCUMENTS_PER_CHUNK):
            missing = [document for document in group if document.content_hash not in known]
            for kept, vectors in encode_documents(
                model, missing, on_error=lambda d, e: failed.update({d.content_hash: e})
            ):
                store.upsert(
                    [
                        IndexRow(d.content_hash, RowHashes(d.content_hash, ""), "", None, None, {})
                        for d in kept
                    ],
                    vectors,
                )
                known.update(document.content_hash for document in kept)
                new += len(kept)
            bar.advance(len(group))
    store.close()
    gone = {
        key: failed[document.content_hash]
        for key, document in documents.items()
        if document.content_hash in failed
    }
    for key in gone:
        del documents[key]
    return (
        store.read_vectors([document.content_hash for document in documents.values()]).astype(
            np.float64
        ),
        new,
        gone,
    )


def _mined(
    pool: _Pool, *, k: int, margin: float, made_by: str, found: list[_Found]
) -> Iterator[Record]:
    """The records with their new negatives; `found` gets what was found for each."""
    queries, candidates = pool.vectors
    row = {key: i for i, key in enumerate(pool.queries)}
    column = {key: i for i, key in enumerate(pool.candidates)}
    parts = [document.parts for document in pool.candidates.values()]
    made_of = np.array([_made_of(one) for one in parts])
    for block in batched(pool.asked, QUERIES_PER_BLOCK):
        # Rounded float64: equal content ties exactly, whatever the blocks or the machine.
        scores = np.round(
            queries[[row[q.query] for q in block]] @ candidates.T, SCORE_DECIMALS
        )  # [B, C]
        right = [[column[key] for key in q.positive] for q in block]
        lowest = np.array([scores[i, at].min() for i, at in enumerate(right)])  # [B]
        limits = np.round(lowest - margin, SCORE_DECIMALS)
        allowed = made_of[None, :] == made_of[[at[0] for at in right]][:, None]  # [B, C]
        for i, question in enumerate(block):
            known = pool.right[question.query].union(question.negative)
            allowed[i, [column[key] for key in known if key in column]] = False
        near = (allowed & (scores >= limits[:, None])).sum(1)
        for i, chosen in enumerate(select_hardest(scores, allowed=allowed, limits=limits, k=k)):
            record = block[i].record
            found.append(
                _Found(float(lowest[i]), tuple(float(scores[i, at]) for at in chosen), int(near[i]))
            )
            told = {"model": made_by, "margin": margin, "positive_score": float(lowest[i])}
            told["negative_scores"] = list(found[-1].scores)
            negative = (*record.negative, *(parts[at] for at in chosen))
            yield replace(record, negative=negative, metadata={**record.metadata, "mined": told})


def _made_of(parts: Parts) -> str:
    return "+".join(sorted({"image" if isinstance(part, ImageRef) else "text" for part in parts}))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
