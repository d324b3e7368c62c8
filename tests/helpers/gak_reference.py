"""Slow references of the alignment kernel, one cell at a time, and inputs for its tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_reference_kernel(distances: list[list[float]], sigma: float) -> float:
    """Return G[M, N] of the paper's recursion; distances are squared."""
    num_rows = len(distances)
    num_columns = len(distances[0])
    g = [[0.0] * (num_columns + 1) for _ in range(num_rows + 1)]
    g[0][0] = 1.0
    for i in range(1, num_rows + 1):
        for j in range(1, num_columns + 1):
            s = math.exp(-distances[i - 1][j - 1] / (2 * sigma**2))
            g[i][j] = (g[i][j - 1] + g[i - 1][j - 1] + g[i - 1][j]) * s / (2 - s)
    return g[num_rows][num_columns]


def compute_reference_matrix(
    x: list[Tensor],
    y: list[Tensor],
    *,
    sigma: float | None = None,
    delta: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """Return what `gak_matrix` must return, in float64, one pair at a time."""

    def distances(a: Tensor, b: Tensor) -> list[list[float]]:
        return (a[:, None] - b).square().sum(2).tolist()

    def compute_pair(a: Tensor, b: Tensor) -> float:
        width = sigma or delta * math.sqrt((len(a) + len(b)) / 2)
        joint = compute_reference_kernel(distances(a, b), width)
        if not normalize:
            return joint
        self_a = compute_reference_kernel(distances(a, a), width)
        self_b = compute_reference_kernel(distances(b, b), width)
        return joint / math.sqrt(self_a * self_b)

    rows = []
    for a in x:
        rows.append([compute_pair(a, b) for b in y])
    return torch.tensor(rows, dtype=torch.float64)


def compute_reference_log_kernel(log_kappa: Tensor) -> Tensor:
    """Return log K of one pair, a scalar with gradient, from log kappa, float[M, N]."""
    num_rows, num_columns = log_kappa.shape
    minus_infinity = log_kappa.new_tensor(-math.inf)
    log_g = [[minus_infinity] * (num_columns + 1) for _ in range(num_rows + 1)]
    log_g[0][0] = log_kappa.new_tensor(0.0)
    for i in range(num_rows):
        for j in range(num_columns):
            neighbours = (log_g[i + 1][j], log_g[i][j], log_g[i][j + 1])
            finite = [value for value in neighbours if float(value.detach()) > -math.inf]
            log_g[i + 1][j + 1] = torch.logsumexp(torch.stack(finite), 0) + log_kappa[i, j]
    return log_g[num_rows][num_columns]


def draw_sequences(
    lengths: list[int], *, seed: int = 0, dim: int = 5, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return sequences of unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        slices = torch.randn(length, dim, dtype=torch.float64, generator=generator)
        sequences.append(F.normalize(slices, dim=1).to(dtype))
    return sequences


def draw_pairs(
    num_pairs: int, num_rows: int, num_columns: int, *, seed: int = 0, max_distance: float = 4.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return squared distances, float64[P, M, N], and lengths of x and of y, int64[P]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_pairs, num_rows, num_columns)
    distances = torch.rand(shape, dtype=torch.float64, generator=generator) * max_distance
    lengths_x = torch.randint(1, num_rows + 1, (num_pairs,), generator=generator)
    lengths_y = torch.randint(1, num_columns + 1, (num_pairs,), generator=generator)
    return distances, lengths_x, lengths_y


def cut(distances: Tensor, length_x: Tensor, length_y: Tensor) -> list[list[float]]:
    """Return the distances of one pair, without what lies beyond its lengths."""
    return distances[: int(length_x), : int(length_y)].tolist()
