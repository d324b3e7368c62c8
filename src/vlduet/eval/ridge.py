"""The baseline that keeps a joint model honest: ridge regression from image features to text vectors.

It trains in seconds and nothing in it speaks. A joint model that does not beat it has not earned its keep.

    image features [F] -> unit length - mean -> W [F, D] ──┐
                                                           ├── cosine
    text vectors [D]   -> unit length - mean ──────────────┘

Both means are those of the training pairs; the strength of the penalty is chosen on validation records,
never on the held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from vlduet.data.content_keys import text_key
from vlduet.data.records import ImageRef, Record
from vlduet.eval.metrics import Bools, hit_at_k
from vlduet.eval.protocols import RetrievalResult, cosine, image_and_captions, measure_retrieval

Floats = NDArray[np.float64]

PENALTY_GRID = tuple(float(10**e) for e in np.arange(-3.0, 2.01, 0.25))
"""Penalties that are tried, as multiples of the mean squared singular value of the features."""


@dataclass(frozen=True, slots=True)
class RidgeValidation:
    """What the penalty is chosen on."""

    image_features: NDArray[np.floating]
    """float[N, F]"""
    text_vectors: NDArray[np.floating]
    """float[C, D], distinct captions."""
    relevant: Bools
    """bool[C, N]"""


@dataclass(frozen=True, slots=True)
class RidgeBaseline:
    """A fitted baseline; `embed_image` and `embed_text` make vectors of the same space."""

    weights: Floats
    """float[F, D]"""
    feature_mean: Floats
    """float[F]"""
    text_mean: Floats
    """float[D]"""
    penalty: float
    """lambda of |X W - Y|^2 + lambda |W|^2, X and Y centred, rows of X of unit length before centring."""
    validation_hit_rates: dict[float, float]
    """Mean validation hit@10 of both directions by penalty."""

    @classmethod
    def fit(
        cls,
        image_features: NDArray[np.floating],
        text_vectors: NDArray[np.floating],
        *,
        validation: RidgeValidation,
        grid: Sequence[float] = PENALTY_GRID,
    ) -> Self:
        """Fit every penalty of the grid with one decomposition and keep the best on validation.

        Args:
            image_features: float[N, F], one row a training pair.
            text_vectors: float[N, D], the caption of each.
            validation: judged by the mean hit@10 of both directions; hit@1 decides between equals, then the
            larger penalty.
            grid: multiples of the mean squared singular value of the centred features.
        """
        assert len(image_features) == len(text_vectors) > 1, (
            len(image_features),
            len(text_vectors),
        )
        x, y = _unit(image_features), _unit(text_vectors)
        feature_mean, text_mean = x.mean(0), y.mean(0)
        left, singular, right = np.linalg.svd(x - feature_mean, full_matrices=False)
        target = left.T @ (y - text_mean)  # [min(N, F), D]
        tried: list[tuple[float, float, Self]] = []
        for multiple in grid:
            penalty = float(multiple * np.mean(singular**2))
            weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * target)
            fitted = cls(weights, feature_mean, text_mean, penalty, {})
            ten, one = fitted._judge(validation)
            tried.append((ten, one, fitted))
        best = max(tried, key=lambda row: (row[0], row[1], row[2].penalty))[2]
        best.validation_hit_rates.update({fitted.penalty: ten for ten, _, fitted in tried})
        return best

    def embed_image(self, image_features: NDArray[np.floating]) -> NDArray[np.float32]:
        """float[N, F] -> unit vectors float32[N, D]."""
        return _unit((_unit(image_features) - self.feature_mean) @ self.weights).astype(np.float32)

    def embed_text(self, text_vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """float[N, D] -> unit vectors float32[N, D], centred."""
        return _unit(_unit(text_vectors) - self.text_mean).astype(np.float32)

    def _judge(self, validation: RidgeValidation) -> tuple[float, float]:
        """(hit@10, hit@1) on validation, each the mean of both directions."""
        images, texts = (
            self.embed_image(validation.image_features),
            self.embed_text(validation.text_vectors),
        )
        similarity, relevant = cosine(texts, images), validation.relevant
        both = [hit_at_k(similarity, relevant), hit_at_k(similarity.T, relevant.T)]
        return sum(d["hit@10"] for d in both) / 2, sum(d["hit@1"] for d in both) / 2


def evaluate_ridge_baseline(
    features: Callable[[list[ImageRef]], NDArray[np.floating]],
    vectors: Callable[[list[str]], NDArray[np.floating]],
    *,
    train: Sequence[Record],
    validation: Sequence[Record],
    held_out: Sequence[Record],
) -> RetrievalResult:
    """Fit the baseline and run the retrieval protocol on it.

    Args:
        features: images -> float[N, F] of a frozen vision tower.
        vectors: captions -> float[N, D] of a frozen text encoder.
        train, validation, held_out: pairs with an image and a short caption, of which the first is used for fitting.

    Raises:
        DataError: a record that is no such pair.
    """
    pairs, checks = (
        [image_and_captions(record) for record in train],
        [image_and_captions(record) for record in validation],
    )
    keys = [text_key(captions[0]) for _, captions in checks]
    distinct = {key: captions[0] for key, (_, captions) in zip(keys, checks, strict=True)}
    relevant = np.array([[key == own for own in keys] for key in distinct])
    fitted = RidgeBaseline.fit(
        features([image for image, _ in pairs]),
        vectors([captions[0] for _, captions in pairs]),
        validation=RidgeValidation(
            features([image for image, _ in checks]), vectors(list(distinct.values())), relevant
        ),
    )
    return measure_retrieval(
        lambda refs: fitted.embed_image(features(refs)),
        lambda captions: fitted.embed_text(vectors(captions)),
        records=held_out,
    )


def _unit(rows: NDArray[np.floating]) -> Floats:
    """Rows of unit length, float64; a row of zeros stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
