"""Where rows and their vectors are kept: the narrow interface, and the exact flat store.

Every store gives the same answers: exact cosines, best first, ties by id. `FlatStore` is the plain twin that
the tests hold `LanceStore` against, and good for up to some 100 000 rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zipfile import BadZipFile

import numpy as np

from vlduet.errors import RetrievalError
from vlduet.files import write_atomically
from vlduet.retrieval.filters import Condition, Scalar

SCORE_TOLERANCE = 1e-5
"""More than float32 arithmetic can move a cosine: candidates this close to the k-th are scored in float64."""


class RowHashes(NamedTuple):
    """What a stored row was made of; an equal stamp means that nothing has to be done."""

    content_hash: str
    """Hash of what was embedded."""
    details_hash: str
    """Hash of everything else: text, metadata, image path."""


@dataclass(frozen=True, slots=True)
class IndexRow:
    """One document as it is stored."""

    id: str
    hashes: RowHashes
    text: str
    image_path: str | None
    """Absolute path."""
    relative_image_path: str | None
    """The same path seen from the index folder, for folders that are moved together."""
    metadata: Mapping[str, Any]
    filter_values: Mapping[str, Scalar] = field(default_factory=dict, compare=False)
    """The metadata that can be filtered by. Not given back by searches."""


class ScoredRow(NamedTuple):
    """A row and its cosine to the query, rounded to six decimals."""

    row: IndexRow
    score: float


class VectorStore(Protocol):
    """Rows and unit vectors by id. One process writes at a time (`build` holds the lock); others may read meanwhile, and see
    either what was there when they opened or something newer."""

    def read_hashes(self) -> dict[str, RowHashes]:
        """What is there, by id."""

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """float32[N, D] of stored ids, in their order."""

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        """Write rows of distinct ids and float32[N, D], replacing rows of the same id; durable on return."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows; unknown ids are ignored; durable on return."""

    def search(
        self, queries: np.ndarray, *, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[ScoredRow]]:
        """The k best rows that satisfy `where`, or all if fewer, for each of float32[Q, D] unit queries."""

    def count(self) -> int:
        """Rows."""

    def close(self) -> None:
        """Tidy up what many small writes left, and let go of files."""


def rank_candidates(
    query: np.ndarray, k: int, *, ids: Sequence[str], vectors: np.ndarray
) -> list[tuple[int, float]]:
    """(position, cosine) of the k best of candidates float32[N, D], ties by id.

    Scored in float64 and rounded, so equal content ties exactly whatever the order of rows or the machine.
    """
    scores = np.round(vectors.astype(np.float64) @ query.astype(np.float64), 6) + 0.0
    order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))[:k]
    return [(i, float(scores[i])) for i in order]


class FlatStore:
    """Everything in memory; on disk one ``.npz`` a write, joined into one on close.

    Args:
        folder: made where it is missing and `write` is set.
        dim: D, the width of the vectors.
        write: whether this process holds the index's lock.

    Raises:
        RetrievalError: a segment that cannot be read.
    """

    def __init__(self, folder: Path, *, dim: int, write: bool):
        self.folder, self.dim, self.write = folder, dim, write
        self._held: dict[str, tuple[IndexRow, np.ndarray]] = {}
        self._table: tuple[list[IndexRow], np.ndarray] | None = None
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            for segment in self._segments():
                self._load(segment)
        except FileNotFoundError:  # its writer joined them just now
            self._held.clear()
            for segment in self._segments():
                self._load(segment)

    def _segments(self) -> list[Path]:
        return sorted(self.folder.glob("segment-*.npz"))

    def _load(self, segment: Path) -> None:
        try:
            with np.load(segment) as arrays:
                vectors, told = arrays["vectors"], json.loads(arrays["told"].tobytes())
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            fix = "Delete the index and build it again"
            raise RetrievalError(f"cannot be read ({error})", place=segment, fix=fix) from None
        if told["whole"]:
            self._held.clear()
        for identity in told["deleted"]:
            self._held.pop(identity, None)
        for raw, vector in zip(told["rows"], vectors, strict=True):
            row = IndexRow(**raw | {"stamp": RowHashes(*raw["stamp"])})
            self._held[row.id] = row, vector

    def _save(
        self,
        rows: Sequence[IndexRow],
        vectors: np.ndarray,
        *,
        deleted: Sequence[str] = (),
        whole: bool = False,
    ) -> None:
        last = self._segments()[-1:]
        number = int(last[0].stem.removeprefix("segment-")) + 1 if last else 0
        told = json.dumps(
            {"rows": [asdict(row) for row in rows], "deleted": list(deleted), "whole": whole}
        ).encode()
        arrays: dict[str, Any] = {
            "vectors": vectors.astype(np.float32),
            "told": np.frombuffer(told, dtype=np.uint8),
        }
        write_atomically(
            self.folder / f"segment-{number:08d}.npz", lambda file: np.savez(file, **arrays)
        )
        self._table = None

    def read_hashes(self) -> dict[str, RowHashes]:
        """What is there, by id."""
        return {identity: row.hashes for identity, (row, _) in self._held.items()}

    def read_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """float32[N, D] of stored ids."""
        return np.stack([self._held[identity][1] for identity in ids]) if ids else self._empty()

    def _empty(self) -> np.ndarray:
        return np.empty((0, self.dim), dtype=np.float32)

    def upsert(self, rows: Sequence[IndexRow], vectors: np.ndarray) -> None:
        """Write rows and their vectors."""
        assert vectors.shape == (len(rows), self.dim) and self.write
        self._save(rows, vectors)
        self._held |= {
            row.id: (row, vector)
            for row, vector in zip(rows, vectors.astype(np.float32), strict=True)
        }

    def delete(self, ids: Sequence[str]) -> None:
        """Remove rows."""
        assert self.write
        self._save([], self._empty(), deleted=ids)
        for identity in ids:
            self._held.pop(identity, None)

    def search(
        self, queries: np.ndarray, *, k: int, conditions: Sequence[Condition] = ()
    ) -> list[list[ScoredRow]]:
        """The k best rows for each query."""
        if self._table is None:
            held = list(self._held.values())
            self._table = (
                [row for row, _ in held],
                np.stack([v for _, v in held]) if held else self._empty(),
            )
        rows, vectors = self._table
        if conditions:
            kept = [
                i
                for i, row in enumerate(rows)
                if all(c.matches(row.filter_values) for c in conditions)
            ]
            rows, vectors = [rows[i] for i in kept], vectors[kept]
        found = []
        for query in queries.astype(np.float32):
            scores = vectors @ query  # [N]
            floor = np.partition(scores, -k)[-k] - SCORE_TOLERANCE if len(rows) > k else -np.inf
            near = np.flatnonzero(scores >= floor)
            ranked = rank_candidates(
                query, k, ids=[rows[i].id for i in near], vectors=vectors[near]
            )
            found.append([ScoredRow(rows[near[i]], score) for i, score in ranked])
        return found

    def count(self) -> int:
        """Rows."""
        return len(self._held)

    def close(self) -> None:
        """Join the segments."""
        before = self._segments()
        if not self.write or len(before) < 2:
            return
        held = list(self._held.values())
        self._save(
            [row for row, _ in held], self.read_vectors([row.id for row, _ in held]), whole=True
        )
        for segment in before:
            segment.unlink()
