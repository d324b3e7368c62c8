"""Retrieval and caption metrics in plain numpy, so that anyone can check how models are scored.

Retrieval is scored strictly: a tie with a non-relevant item counts as a miss, and NaN never helps.
An encoder that gives every item the same vector therefore scores 0, not 100.
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
"""Values of k for which hit@k is reported."""

INTERVAL_PERCENTILES = (2.5, 97.5)
"""Percentiles of the resampled means that bound a 95 % bootstrap interval."""

NUM_RESAMPLES = 2000
"""Number of bootstrap resamples."""

RESAMPLES_PER_BLOCK = 50
"""Number of resamples drawn at once; limits memory. Another value changes the random draws."""


def first_hit_ranks(similarity: Floats, relevant: Bools) -> Ints:
    """Return the rank of the best relevant item of every query, int[Q]; 1 is best.

    The rank is 1 + the number of non-relevant items that score at least as high as the best
    relevant item. A relevant item whose score is NaN loses to everything; a non-relevant item whose
    score is NaN beats everything.

    Args:
        similarity: float[Q, G], higher is closer.
        relevant: bool[Q, G]; a query without a relevant item raises AssertionError.
    """
    positives, scores = _worst_case_scores(similarity, relevant)
    beats_best = scores >= positives.max(1, keepdims=True)  # [Q, G]
    return np.asarray(1 + beats_best.sum(1, where=~relevant), dtype=np.int64)


def hit_at_k(
    similarity: Floats, relevant: Bools, ks: Iterable[int] = HIT_CUTOFFS
) -> dict[str, float]:
    """Return the fraction of queries with a relevant item among the first k, keyed ``hit@k``.

    Papers on image-text retrieval call this number R@k. For shapes, ties and NaN see
    `first_hit_ranks`.
    """
    return hit_rates(first_hit_ranks(similarity, relevant), ks)


def hit_rates(ranks: Ints, ks: Iterable[int] = HIT_CUTOFFS) -> dict[str, float]:
    """Return the fraction of `ranks` (int[Q], 1 is best) that are at most k, keyed ``hit@k``."""
    return {f"hit@{k}": float((ranks <= k).mean()) for k in ks}


def _worst_case_scores(similarity: Floats, relevant: Bools) -> tuple[Floats, Floats]:
    """Return two float[Q, G] arrays in which a missing score always counts against the model.

    Returns:
        The similarity at relevant items and -inf elsewhere, also where it is NaN.
        The similarity everywhere (relevant items are not masked), with NaN replaced by +inf.

    Raises:
        AssertionError: the shapes differ or are not two-dimensional, `relevant` is not bool, or a
            query has no relevant item.
    """
    assert similarity.shape == relevant.shape, (similarity.shape, relevant.shape)
    assert similarity.ndim == 2, similarity.shape
    assert relevant.dtype == np.bool_, relevant.dtype
    assert relevant.any(1).all(), "a query without a positive has no rank"
    is_missing = np.isnan(similarity)
    positives = np.where(relevant & ~is_missing, similarity, -np.inf)
    scores = np.where(is_missing, np.inf, similarity)
    return positives, scores


def chance_hit_at_k(relevant: Bools, ks: Iterable[int] = HIT_CUTOFFS) -> dict[str, float]:
    """Return the exact expectation of `hit_at_k` for a random order, keyed ``hit@k``.

    A query with p relevant items of G has the probability 1 - C(G - p, k) / C(G, k): 0 for p = 0,
    and 1 for p > 0 and k >= G.

    Args:
        relevant: bool[Q, G]; Q = 0 raises ZeroDivisionError.
        ks: cutoffs.
    """
    num_gallery = relevant.shape[1]
    num_positives = Counter(relevant.sum(1).tolist())  # number of positives -> number of queries

    def chance(k: int) -> float:
        """Return the expected fraction of queries with a relevant item among k random ones.

        It is 1 - mean of C(G - p, k) / C(G, k) over the queries; a larger k counts as k = G.
        """
        k = min(k, num_gallery)
        num_draws = math.comb(num_gallery, k)
        expected_misses = 0.0
        for p, num_queries in num_positives.items():
            expected_misses += math.comb(num_gallery - p, k) / num_draws * num_queries
        return 1.0 - expected_misses / len(relevant)

    return {f"hit@{k}": chance(k) for k in ks}


# ------------------------------------------------------------------ intervals


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Sign of a difference that the interval resolves: ``above``, ``below`` or ``level``."""
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "level"


def bootstrap_interval(
    values: ArrayLike, seed: int = 0, *, weights: ArrayLike | None = None
) -> Interval:
    """Return a mean over items with its 95 % percentile bootstrap interval.

    Args:
        values: float[N] with N > 0, one value per item (0 or 1 for a hit).
        seed: seed of the resamples; equal seeds give equal intervals.
        weights: float[N]; the mean is then sum(w v) / sum(w), as for nats per token with w = number
            of tokens.

    Raises:
        AssertionError: no values, more than one dimension, or weights of another length.
    """
    v = np.asarray(values, dtype=np.float64)
    w = np.ones_like(v) if weights is None else np.asarray(weights, dtype=np.float64)
    assert v.ndim == 1 and v.shape == w.shape and len(v), (v.shape, w.shape)
    means = bootstrap_means(v * w, seed) / bootstrap_means(w, seed)
    low, high = np.percentile(means, INTERVAL_PERCENTILES)
    return Interval(float((v * w).sum() / w.sum()), float(low), float(high))


def paired_bootstrap(values: ArrayLike, reference: ArrayLike, *, seed: int = 0) -> Interval:
    """Return mean(values - reference) with its bootstrap interval over the same items.

    An interval that excludes 0 resolves the difference.

    Args:
        values, reference: float[N] each; index i is the same item in both.
    """
    a = np.asarray(values, dtype=np.float64)
    b = np.asarray(reference, dtype=np.float64)
    assert a.shape == b.shape, "pairs are of the same items"
    return bootstrap_interval(a - b, seed)


def bootstrap_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the means of `NUM_RESAMPLES` resamples of `values`, float[NUM_RESAMPLES].

    The drawn indices depend on the seed and on len(values) alone, so two arrays of equal length are
    resampled in pairs. No global random state is used. No values raise ValueError.
    """
    random = np.random.default_rng(seed)
    means = []
    for _ in range(NUM_RESAMPLES // RESAMPLES_PER_BLOCK):
        indices = random.integers(0, len(values), (RESAMPLES_PER_BLOCK, len(values)))
        means.append(values[indices].mean(1))
    return np.concatenate(means)


# ------------------------------------------------------------------ captions


def tokenize_answer(text: str) -> list[str]:
    """Return the words of a text as SQuAD's official script compares them.

    The text is lower-cased and loses ASCII punctuation and the articles a, an, the.
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if a prediction has the same `tokenize_answer` as some reference, else 0."""
    words = tokenize_answer(prediction)
    return float(any(words == tokenize_answer(reference) for reference in references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of word precision and recall (SQuAD), the best over references.

    Two texts without words score 1. No references raise ValueError.
    """
    words = tokenize_answer(prediction)
    return max(_word_f1(words, tokenize_answer(reference)) for reference in references)


def _word_f1(prediction: list[str], reference: list[str]) -> float:
    """Return the F1 of two bags of words; 1 if both are empty and 0 if only one is."""
    if not prediction or not reference:
        return float(prediction == reference)
    num_common = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * num_common / (len(prediction) + len(reference))
