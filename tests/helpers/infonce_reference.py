"""Slow reference of the symmetric InfoNCE, one pair at a time, and unit vectors for its tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_unit_vectors(rows: int, seed: int) -> Tensor:
    """Return random unit vectors, float64[rows, 6]."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, dtype=torch.float64, generator=generator), dim=1)


def compute_reference_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: float,
    positive_mask: Tensor,
    ignore_mask: Tensor | None = None,
) -> float:
    """Return the sum of the mean losses of rows and of columns that have a positive."""
    if ignore_mask is None:
        ignore_mask = torch.zeros_like(positive_mask)
    scores = queries @ targets.T * math.exp(logit_scale)
    return _mean_row_loss(scores, positive_mask, ignore_mask) + _mean_row_loss(
        scores.T, positive_mask.T, ignore_mask.T
    )


def _mean_row_loss(scores: Tensor, positive_mask: Tensor, ignore_mask: Tensor) -> float:
    """Return the mean over rows of -log of e^s over itself and the row's negatives."""
    row_losses = []
    for row, positives, ignored in zip(
        scores.tolist(), positive_mask.tolist(), ignore_mask.tolist(), strict=True
    ):
        negatives = 0.0
        for score, is_positive, is_ignored in zip(row, positives, ignored, strict=True):
            if not is_positive and not is_ignored:
                negatives += math.exp(score)
        losses = []
        for score, is_positive in zip(row, positives, strict=True):
            if is_positive:
                losses.append(-math.log(math.exp(score) / (math.exp(score) + negatives)))
        if losses:
            row_losses.append(sum(losses) / len(losses))
    return sum(row_losses) / len(row_losses) if row_losses else 0.0
