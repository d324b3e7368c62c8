"""Ridge baseline: linear regression from frozen image features to frozen text vectors.

It is fitted in seconds and cannot generate. A joint model should beat it.

    image features [F] -> unit length - mean -> W [F, D] ──┐
                                                           ├── cosine
    text vectors [D]   -> unit length - mean ──────────────┘

Both means are those of the training pairs. The penalty is chosen on validation records, never on
the held-out ones.
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
"""Penalties to choose from, as multiples of the mean squared singular value of the features."""


@dataclass(frozen=True, slots=True)
class RidgeValidation:
    """Validation data of N images and C captions on which the penalty is chosen."""

    image_features: NDArray[np.floating]
    """float[N, F]."""
    text_vectors: NDArray[np.floating]
    """float[C, D], of distinct captions."""
    relevant: Bools
    """bool[C, N], which caption belongs to which image."""


@dataclass(frozen=True, slots=True)
class RidgeBaseline:
    """Fitted baseline; `embed_image` and `embed_text` return vectors of one space."""

    weights: Floats
    """float[F, D]."""
    feature_mean: Floats
    """float[F], mean of the unit-length training features."""
    text_mean: Floats
    """float[D], mean of the unit-length training vectors."""
    penalty: float
    """lambda of |X W - Y|^2 + lambda |W|^2; X, Y are rows of unit length, then centred."""
    validation_hit_rates: dict[float, float]
    """Penalty -> mean validation hit@10 of both directions, for every penalty of the grid."""

    @classmethod
    def fit(
        cls,
        image_features: NDArray[np.floating],
        text_vectors: NDArray[np.floating],
        *,
        validation: RidgeValidation,
        grid: Sequence[float] = PENALTY_GRID,
    ) -> Self:
        """Fit every penalty of the grid with one decomposition and return the best on validation.

        The best has the highest mean hit@10 of both directions; hit@1 decides between equals, then
        the larger penalty.

        Args:
            image_features: float[N, F] with N > 1, one row per training pair, of any length.
            text_vectors: float[N, D], the caption of each pair, of any length.
            validation: data that every penalty is scored on; the result's `validation_hit_rates`
                has the scores of all.
            grid: penalties as multiples of the mean squared singular value of the features, scaled
                to unit length and centred. An empty grid raises ValueError.

        Raises:
            AssertionError: fewer than two pairs, different numbers of rows, or a validation image
                or caption without a partner.
        """
        assert len(image_features) == len(text_vectors) > 1, (
            len(image_features),
            len(text_vectors),
        )
        x = _scale_to_unit(image_features)
        y = _scale_to_unit(text_vectors)
        feature_mean = x.mean(0)
        text_mean = y.mean(0)
        left, singular, right = np.linalg.svd(x - feature_mean, full_matrices=False)
        target = left.T @ (y - text_mean)  # [min(N, F), D]
        candidates: list[tuple[float, float, Self]] = []
        for multiple in grid:
            penalty = float(multiple * np.mean(singular**2))
            shrinkage = singular / (singular**2 + penalty)
            weights = right.T @ (shrinkage[:, None] * target)
            baseline = cls(weights, feature_mean, text_mean, penalty, {})
            hit_10, hit_1 = baseline._validate(validation)
            candidates.append((hit_10, hit_1, baseline))
        best = max(candidates, key=lambda row: (row[0], row[1], row[2].penalty))[2]
        for hit_10, _, baseline in candidates:
            best.validation_hit_rates[baseline.penalty] = hit_10
        return best

    def embed_image(self, image_features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return float[N, F] features as vectors of unit length, float32[N, D]."""
        centred = _scale_to_unit(image_features) - self.feature_mean
        return _scale_to_unit(centred @ self.weights).astype(np.float32)

    def embed_text(self, text_vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return float[N, D] vectors centred and scaled to unit length, float32[N, D]."""
        return _scale_to_unit(_scale_to_unit(text_vectors) - self.text_mean).astype(np.float32)

    def _validate(self, validation: RidgeValidation) -> tuple[float, float]:
        """Return (hit@10, hit@1) on validation data, fractions, each the mean of both directions.

        Raises AssertionError where an image or a caption has no partner. Nothing is stored.
        """
        images = self.embed_image(validation.image_features)
        texts = self.embed_text(validation.text_vectors)
        similarity = cosine(texts, images)  # [C, N]
        text_to_image = hit_at_k(similarity, validation.relevant)
        image_to_text = hit_at_k(similarity.T, validation.relevant.T)
        hit_10 = (text_to_image["hit@10"] + image_to_text["hit@10"]) / 2
        hit_1 = (text_to_image["hit@1"] + image_to_text["hit@1"]) / 2
        return hit_10, hit_1


def evaluate_ridge_baseline(
    embed_images: Callable[[list[ImageRef]], NDArray[np.floating]],
    embed_texts: Callable[[list[str]], NDArray[np.floating]],
    *,
    train: Sequence[Record],
    validation: Sequence[Record],
    held_out: Sequence[Record],
) -> RetrievalResult:
    """Fit the baseline and measure its retrieval on the held-out records.

    Args:
        embed_images: images -> float[N, F] features of a frozen vision tower; called once per set.
        embed_texts: captions -> float[N, D] vectors of a frozen text encoder; called once per set.
        train: at least two pairs with an image and a short caption, of which the first is used;
            fewer raise AssertionError.
        validation: at least one such pair, to choose the penalty; equal captions are one text.
        held_out: such pairs, searched by all of their captions (see `measure_retrieval`).

    Raises:
        DataError: a record without an image or a short caption, or no held-out records.
    """
    train_pairs = [image_and_captions(record) for record in train]
    validation_pairs = [image_and_captions(record) for record in validation]
    keys = [text_key(captions[0]) for _, captions in validation_pairs]
    distinct: dict[str, str] = {}
    for key, (_, captions) in zip(keys, validation_pairs, strict=True):
        distinct[key] = captions[0]
    relevant = np.array(list(distinct))[:, None] == np.array(keys)[None]  # [C, N]
    baseline = RidgeBaseline.fit(
        embed_images([image for image, _ in train_pairs]),
        embed_texts([captions[0] for _, captions in train_pairs]),
        validation=RidgeValidation(
            embed_images([image for image, _ in validation_pairs]),
            embed_texts(list(distinct.values())),
            relevant,
        ),
    )
    return measure_retrieval(
        lambda images: baseline.embed_image(embed_images(images)),
        lambda captions: baseline.embed_text(embed_texts(captions)),
        records=held_out,
    )


def _scale_to_unit(rows: NDArray[np.floating]) -> Floats:
    """Return rows scaled to unit length, in float64; a row of zeros stays zero."""
    rows = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)
