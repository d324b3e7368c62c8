"""Statistics of the scores that unrelated contents have, by which one score can be judged.

A score is a cosine, and what counts as a high one differs between models, and between texts and
images of one model. `ScoreStatistics` is what ``score_statistics`` in vlduet.json holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np

from vlduet.errors import ModelError, quote_value
from vlduet.library_errors import COPY_AGAIN
from vlduet.structured_files import check_fields

ContentKind = Literal["text", "image", "both"]
"""Type of a query or a document: texts alone, images alone, or texts with images."""
CONTENT_KINDS: tuple[ContentKind, ...] = ("text", "image", "both")
NUM_QUANTILES = 257
"""Number of stored quantiles of a distribution."""
SCORE_DECIMALS = 6
"""Number of decimals of a quantile, and of a score."""


@dataclass(frozen=True, slots=True)
class ScoreDistribution:
    """Distribution of the scores of unrelated pairs of one type of query and of document."""

    num_pairs: int
    """Number of pairs that were compared, at least 1."""
    quantiles: tuple[float, ...]
    """`NUM_QUANTILES` scores in ascending order. The share of pairs with at least the score number
    i is ((256 - i) / 256)², so that high scores, which matter, are close to each other."""

    @classmethod
    def from_scores(cls, scores: np.ndarray) -> Self:
        """Return the distribution of the scores float[N], N >= 1, of unrelated pairs."""
        steps = np.arange(NUM_QUANTILES) / (NUM_QUANTILES - 1)
        quantiles = np.quantile(np.clip(scores, -1, 1).astype(np.float64), 1 - (1 - steps) ** 2)
        return cls(len(scores), tuple(np.round(quantiles, SCORE_DECIMALS).tolist()))

    @classmethod
    def from_manifest(cls, value: Any, *, place: str) -> Self:
        """Return the distribution of an entry of vlduet.json.

        Raises:
            ModelError: a value is missing or of another type, there is another number of quantiles,
                or they are not scores in ascending order.
        """
        fields = {"pairs": int, "quantiles": list}
        check_fields(value, fields, place=place, error_class=ModelError, fix=COPY_AGAIN)
        num_pairs, quantiles = value["pairs"], value["quantiles"]
        if num_pairs < 1:
            message = f"'pairs' is {num_pairs}, not 1 or more"
            raise ModelError(message, place=place, fix=COPY_AGAIN)
        for score in quantiles:
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if not is_number or not -1 <= score <= 1:  # also refuses NaN
                message = f"'quantiles' has {quote_value(score)}, which is no number from -1 to 1"
                raise ModelError(message, place=place, fix=COPY_AGAIN)
        is_ascending = all(low <= high for low, high in pairwise(quantiles))
        if len(quantiles) != NUM_QUANTILES or not is_ascending:
            message = f"'quantiles' are not {NUM_QUANTILES} numbers in ascending order"
            raise ModelError(message, place=place, fix=COPY_AGAIN)
        return cls(num_pairs, tuple(map(float, quantiles)))

    def to_manifest(self) -> dict[str, Any]:
        """Return the distribution as an entry of vlduet.json."""
        return {"pairs": self.num_pairs, "quantiles": list(self.quantiles)}

    def share_at_least(self, score: float) -> float:
        """Return the share of unrelated pairs with at least this score, above 0 and at most 1.

        Of N pairs, a share of c pairs counts as (c + 1) / (N + 1), as if the judged pair were one
        of them: N pairs cannot show that no unrelated pair reaches a score. Between two quantiles,
        the square root of the share is interpolated linearly.
        """
        last = NUM_QUANTILES - 1
        if score <= self.quantiles[0]:
            position = 0.0
        elif score > self.quantiles[-1]:
            position = float(last)
        else:
            upper = int(np.searchsorted(self.quantiles, score, side="left"))
            low, high = self.quantiles[upper - 1], self.quantiles[upper]
            position = upper - 1 + (score - low) / (high - low)
        num_above = ((last - position) / last) ** 2 * self.num_pairs
        return (num_above + 1) / (self.num_pairs + 1)


@dataclass(frozen=True, slots=True)
class ScoreStatistics:
    """Distributions of the scores of unrelated pairs, by types of query and document."""

    num_records: int
    """Number of records whose contents were compared with each other."""
    distributions: Mapping[tuple[ContentKind, ContentKind], ScoreDistribution]
    """Distribution by the type of the query and that of the document. Types that the records do not
    have, or the model does not embed, are left out."""

    def share_at_least(
        self, score: float, *, query: ContentKind, document: ContentKind
    ) -> float | None:
        """Return `ScoreDistribution.share_at_least` for these types; None if they are left out.

        Raises AssertionError for a score that is not finite.
        """
        assert math.isfinite(score)
        distribution = self.distributions.get((query, document))
        return None if distribution is None else distribution.share_at_least(score)

    def to_manifest(self) -> dict[str, Any]:
        """Return the statistics as ``score_statistics`` of vlduet.json.

        It has ``records``, and by type of query, and within that by type of document, ``pairs`` and
        ``quantiles``.
        """
        entries: dict[str, Any] = {"records": self.num_records}
        for (query, document), distribution in self.distributions.items():
            entries.setdefault(query, {})[document] = distribution.to_manifest()
        return entries

    @classmethod
    def from_manifest(cls, value: Any, *, place: str) -> Self | None:
        """Return the statistics of a parsed ``score_statistics``; None for None (there are none).

        Raises:
            ModelError: a broken entry, which is named, with `place`, the path of the file.
        """
        if value is None:
            return None
        place = f"{place}: score_statistics"
        check_fields(value, {"records": int}, place=place, error_class=ModelError, fix=COPY_AGAIN)
        distributions = {}
        for query, entries in value.items():
            if query == "records":
                continue
            kind = _check_kind(query, place)
            check_fields(entries, place=f"{place}.{query}", error_class=ModelError, fix=COPY_AGAIN)
            for document, entry in entries.items():
                key = kind, _check_kind(document, f"{place}.{query}")
                entry_place = f"{place}.{query}.{document}"
                distributions[key] = ScoreDistribution.from_manifest(entry, place=entry_place)
        return cls(value["records"], distributions)


def _check_kind(name: str, place: str) -> ContentKind:
    """Return a type of content by its name; raise ModelError at `place` for another name."""
    for kind in CONTENT_KINDS:
        if name == kind:
            return kind
    message = f"{quote_value(name)} is not one of {', '.join(CONTENT_KINDS)}"
    raise ModelError(message, place=place, fix=COPY_AGAIN)
