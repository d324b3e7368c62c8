"""Interface of a vector store, and the rows that it stores and returns.

Every store gives the same results: exact cosines, best first, ties in the order of the ids. A store
with a search index may miss some of the nearest rows, unless a search asks for exactness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from vlduet.retrieval.filter_values import FilterValue, Scalar
from vlduet.retrieval.filters import Condition

SCORE_TOLERANCE = 1e-5
"""Largest rounding error of a float32 cosine; candidates this close to the k-th best are scored
again in float64."""

ApproximateMode = Literal["auto", "on", "off"]
"""Whether a build makes an index for approximate search: "auto" decides by the number of rows."""
MIN_ROWS_FOR_APPROXIMATE_SEARCH = 100_000
"""Number of rows above which "auto" builds one."""


class RowHashes(NamedTuple):
    """Hashes of the document that a row was made from; a row with equal hashes is current."""

    content_hash: str
    """Hash of the parts that were embedded."""
    details_hash: str
    """Hash of the remaining stored values: text, metadata and image path."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One document as it is stored, without its embedding."""

    id: str
    hashes: RowHashes
    text: str
    image_path: str | None
    """Absolute path."""
    relative_image_path: str | None
    """The same path relative to the index folder, valid after both were moved together."""
    metadata: Mapping[str, Any]
    filter_values: Mapping[str, FilterValue] = field(default_factory=dict, compare=False)
    """Metadata values that filters can test. Empty in rows that a search returns."""


class ScoredRow(NamedTuple):
    """A row and its cosine to the query, rounded to six decimals."""

    row: IndexRow
    score: float


class VectorStore(Protocol):
    """Rows and their unit vectors by id.

    One process writes at a time (`build_index` holds the lock). Others may read meanwhile and see
    the rows that were stored when they opened the store, or newer ones. Writes are durable when
    they return.
    """

    def read_hashes(self) -> dict[str, RowHashes]:
        """Return the hashes of every stored row by id."""

    def read_ids(self) -> set[str]:
        """Return the ids of all stored rows."""

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """Return the vectors of stored ids, float32[N, D]; raise KeyError for an unknown id."""

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        """Insert rows of distinct ids and their unit vectors float32[N, D], or replace them."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; ignore unknown ids."""

    def read_rows(self, ids: Sequence[str]) -> list[IndexRow]:
        """Return the rows of ids, in any order, without those of unknown ids."""

    def read_distinct_values(self, key: str, kind: str, *, limit: int) -> list[Scalar] | None:
        """Return the sorted values of one kind of a metadata key; None for more than `limit`.

        Those of the kind of a list are its items. [] for a key or a kind that no row has.
        """

    def search(
        self,
        queries: np.ndarray,
        *,
        k: int,
        conditions: Sequence[Condition] = (),
        exact: bool = False,
    ) -> list[list[ScoredRow]]:
        """Return for each query of float32[Q, D] its `k` nearest rows that meet all conditions.

        `exact` compares every row, also if the store has an approximate search index.
        """

    def has_search_index(self) -> bool:
        """Return whether searches are approximate unless they ask for exactness."""

    def update_search_index(self, mode: ApproximateMode) -> None:
        """Build the index for approximate search, bring it up to date, or remove it."""

    def count(self) -> int:
        """Return the number of stored rows."""

    def close(self) -> None:
        """Merge the files that many writes left, if the store is open for writing."""


def rank_candidates(
    query: np.ndarray, k: int, *, ids: Sequence[str], vectors: np.ndarray
) -> list[tuple[int, float]]:
    """Return (position, cosine) of the `k` best candidates, best first, ties in the order of ids.

    Fewer are returned if N is less than `k`. `query` is float32[D] and `vectors` float32[N, D], all
    of unit length. Cosines are computed in float64 and rounded to six decimals, so that equal
    content ties exactly on every machine.
    """
    cosines = vectors.astype(np.float64) @ query.astype(np.float64)  # [N]
    scores = np.round(cosines, 6) + 0.0  # adding 0.0 turns -0.0 into 0.0
    order = sorted(range(len(ids)), key=lambda position: (-scores[position], ids[position]))
    return [(position, float(scores[position])) for position in order[:k]]
