"""Metrics in plain numpy, so that anyone can check the judge.

Retrieval is judged strictly: a tie with something wrong counts as a miss, and NaN never helps. An encoder
that gives every item the same vector therefore scores 0, not 100.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

HIT_CUTOFFS = (1, 5, 10)
"""The cut-offs that are reported everywhere."""

NUM_RESAMPLES = 2000
"""Resamples of a bootstrap."""


def first_hit_ranks(similarity: Floats, relevant: Bools) -> Ints:
    """Rank of the best positive of each query.

    Args:
        similarity: float[Q, G], higher is closer.
        relevant: bool[Q, G], at least one positive a query.

    Returns:
        int[Q], 1 + the number of non-relevant items that score at least as high as the best positive. A
        positive whose score is NaN loses to everything, a non-relevant item whose score is NaN beats
        everything.
    """
    positives, negatives = _worst_case_scores(similarity, relevant)
    return np.asarray(
        1 + (negatives >= positives.max(1, keepdims=True)).sum(1, where=~relevant), dtype=np.int64
    )


def hit_at_k(
    similarity: Floats, relevant: Bools, ks: Iterable[int] = HIT_CUTOFFS
) -> dict[str, float]:
    """Fraction of queries with at least one positive among the first k: ``{"hit@1": ..., ...}``.

    What papers on image-text retrieval call R@k. Shapes and ties as in `first_hit_ranks`.
    """
    return hit_rates(first_hit_ranks(similarity, relevant), ks)


def hit_rates(ranks: Ints, ks: Iterable[int] = HIT_CUTOFFS) -> dict[str, float]:
    """`hit_at_k` of ranks that are known: int[Q] -> ``{"hit@1": ..., ...}``."""
    return {f"hit@{k}": float((ranks <= k).mean()) for k in ks}


def recall_at_k(
    similarity: Floats, relevant: Bools, ks: Iterable[int] = HIT_CUTOFFS
) -> dict[str, float]:
    """Fraction of a query's positives found among the first k, averaged over queries: ``{"recall@1": ...,
    ...}``.

    Equal to the hit rate only where every query has one positive. Ties as in `first_hit_ranks`: among equal
    scores the non-relevant come first.
    """
    positives, negatives = _worst_case_scores(similarity, relevant)
    scores = np.where(relevant, positives, negatives)
    # A stable sort by score of (non-relevant, then relevant) puts the non-relevant first among equals.
    first = np.argsort(relevant, axis=1, kind="stable")
    by_score = np.argsort(-np.take_along_axis(scores, first, axis=1), axis=1, kind="stable")
    order = np.take_along_axis(first, by_score, axis=1)
    found = np.take_along_axis(relevant, order, axis=1).cumsum(
        1
    )  # [Q, G], positives among the first 1..G
    total = relevant.sum(1)
    return {f"recall@{k}": float((found[:, min(k, found.shape[1]) - 1] / total).mean()) for k in ks}


def _worst_case_scores(similarity: Floats, relevant: Bools) -> tuple[Floats, Floats]:
    """float[Q, G] twice: scores to read at positives (NaN and others: -inf), and at the others (NaN: inf)."""
    assert similarity.shape == relevant.shape and similarity.ndim == 2, (
        similarity.shape,
        relevant.shape,
    )
    assert relevant.dtype == np.bool_, relevant.dtype
    assert relevant.any(1).all(), "a query without a positive has no rank"
    missing = np.isnan(similarity)
    positives = np.where(relevant & ~missing, similarity, -np.inf)
    negatives = np.where(missing, np.inf, similarity)
    return positives, negatives


def chance_hit_at_k(relevant: Bools, ks: Iterable[int] = HIT_CUTOFFS) -> dict[str, float]:
    """Exact `hit_at_k` of a random order: 1 - C(G - p, k) / C(G, k) for a query with p positives."""
    num_gallery = relevant.shape[1]
    counts = Counter(relevant.sum(1).tolist())

    def chance(k: int) -> float:
        k = min(k, num_gallery)
        miss = {p: math.comb(num_gallery - p, k) / math.comb(num_gallery, k) for p in counts}
        return 1.0 - sum(miss[p] * n for p, n in counts.items()) / len(relevant)

    return {f"hit@{k}": chance(k) for k in ks}


# ------------------------------------------------------------------ intervals


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike, seed: int = 0, *, weights: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of a mean over items.

    Args:
        values: float[N], one value an item (0 or 1 for a hit).
        seed: the same seed gives the same interval.
        weights: float[N]; the mean is then sum(w v) / sum(w), as for nats a token with w = tokens.
        level: coverage.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    assert v.ndim == 1 and v.shape == w.shape and len(v), (v.shape, w.shape)
    means = bootstrap_means(v * w, seed) / bootstrap_means(w, seed)
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float((v * w).sum() / w.sum()), float(low), float(high))


def paired_bootstrap(
    ours: ArrayLike, theirs: ArrayLike, *, seed: int = 0, level: float = 0.95
) -> Interval:
    """Interval of mean(ours - theirs) over the same items; one that excludes 0 resolves the difference."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert a.shape == b.shape, "pairs are of the same items"
    return bootstrap_interval(a - b, seed, level=level)


def bootstrap_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of `DRAWS` resamples, float[DRAWS]; the draws depend on the seed and on len(values) alone."""
    random = np.random.default_rng(seed)
    found = [
        values[random.integers(0, len(values), (50, len(values)))].mean(1)
        for _ in range(NUM_RESAMPLES // 50)
    ]
    return np.concatenate(found)


# ------------------------------------------------------------------ captions


def normalized_words(text: str) -> list[str]:
    """Words as SQuAD's official script compares them: lower case, no ASCII punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `normalized`, else 0."""
    return float(
        any(normalized_words(prediction) == normalized_words(reference) for reference in references)
    )


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall (SQuAD), the best over references; empty equals empty."""
    return max(
        _token_f1(normalized_words(prediction), normalized_words(reference))
        for reference in references
    )


def _token_f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    shared = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * shared / (len(prediction) + len(reference))
