"""Rows, vectors and stores for tests of LanceStore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlduet.retrieval.filter_values import extract_filter_values
from vlduet.retrieval.stores.base import IndexRow, RowHashes, ScoredRow
from vlduet.retrieval.stores.lance import LanceStore

DIM = 4


def make_row(identity: str, version: int = 0, **metadata: Any) -> IndexRow:
    return IndexRow(
        id=identity,
        hashes=RowHashes(f"content {identity} {version}", f"details {version}"),
        text=f"text {identity}",
        image_path=f"/images/{identity}",
        relative_image_path=f"../{identity}",
        metadata=metadata,
        filter_values=extract_filter_values(metadata, {}),
    )


def normalize(vectors: Any) -> np.ndarray:
    matrix = np.asarray(vectors, dtype=np.float64)
    unit: np.ndarray = matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)
    return unit.astype(np.float32)


def ids_of(matches: Sequence[ScoredRow]) -> list[str]:
    return [match.row.id for match in matches]


def open_for_writing(folder: Path, dim: int = DIM) -> LanceStore:
    return LanceStore(folder, dim=dim, write=True)


def open_for_reading(folder: Path) -> LanceStore:
    return LanceStore(folder, dim=DIM, write=False)


AXES = normalize(np.eye(DIM))
