"""Arithmetic of embeddings that needs no model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unit_rows(vectors: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rows of float[N, D] scaled to unit length, in float64; zeros become NaN."""
    rows = np.asarray(vectors, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]
