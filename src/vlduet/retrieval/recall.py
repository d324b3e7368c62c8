"""Recall of the approximate search of an index, measured against its exact search."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np

from vlduet.errors import RetrievalError
from vlduet.logs import track_progress
from vlduet.retrieval.index import Index
from vlduet.retrieval.stores.base import ScoredRow

DEFAULT_SAMPLE = 100
"""Number of documents whose neighbours are searched by default."""


@dataclass(frozen=True, slots=True)
class RecallReport:
    """Result of `measure_recall`."""

    recall: float
    """Share of the `k` nearest documents that the search of the index finds; 1 if it is exact."""
    k: int
    sample: int
    """Number of documents whose neighbours were searched."""
    count: int
    """Number of documents in the index."""
    is_approximate: bool
    """Whether the index has an approximate search index."""
    approximate_ms: float
    """Median time of a search as users get it, in milliseconds."""
    exact_ms: float
    """Median time of an exact search, in milliseconds."""


def measure_recall(
    index: Index, *, k: int = 10, sample: int = DEFAULT_SAMPLE, seed: int = 0
) -> RecallReport:
    """Search the neighbours of stored documents approximately and exactly, and compare them.

    A document is not its own neighbour. A neighbour counts as found if its score is at least that
    of the exact `k`-th, so that any of several documents with equal scores is right.

    Args:
        index: index that is measured.
        k: number of neighbours of each document.
        sample: number of documents, drawn at random; all if the index has fewer.
        seed: seed of the draw.

    Raises:
        RetrievalError: an index with fewer than two documents, or `k` or `sample` below 1.
    """
    if k < 1 or sample < 1:
        fix = "Give 1 or more"
        raise RetrievalError(f"k {k}, sample {sample}", place="recall", fix=fix)
    ids = sorted(index.store.read_ids())
    if len(ids) < 2:
        fix = "Index more documents first"
        raise RetrievalError("fewer than two documents", place=index.path, fix=fix)
    chosen = random.Random(seed).sample(ids, min(sample, len(ids)))
    vectors = index.store.read_vectors(chosen)  # [N, D]
    shares: list[float] = []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for document_id, vector in track_progress(
        zip(chosen, vectors, strict=True), label="check", total=len(chosen)
    ):
        scores = {}
        for exact in (False, True):
            start = time.perf_counter()
            (rows,) = index.store.search(vector[None], k=k + 1, exact=exact)
            seconds[exact].append(time.perf_counter() - start)
            scores[exact] = _neighbour_scores(rows, document_id, k)
        found = sum(score >= scores[True][-1] for score in scores[False])
        shares.append(found / len(scores[True]))
    return RecallReport(
        recall=float(np.mean(shares)),
        k=k,
        sample=len(chosen),
        count=len(ids),
        is_approximate=index.store.has_search_index(),
        approximate_ms=float(np.median(seconds[False])) * 1000,
        exact_ms=float(np.median(seconds[True])) * 1000,
    )


def _neighbour_scores(rows: list[ScoredRow], document_id: str, k: int) -> list[float]:
    """Return the scores of the `k` best rows besides the document itself."""
    return [row.score for row in rows if row.row.id != document_id][:k]
