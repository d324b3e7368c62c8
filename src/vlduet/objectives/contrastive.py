"""Symmetric InfoNCE with several positives, hard negatives and masks (L_c of VladVA; CLIP, SupCon).

    s_ij = <a_i, b_j> / tau
    L_c  = (1/n) sum_i [ -log softmax_row(s)_i+  -  log softmax_col(s)_i+ ]

A row may have several positives, for example because a caption occurs twice. Its loss is then the
mean of -log p over them, where each positive competes with *itself and the negatives* only. No
other positive is in the denominator, so that duplicates neither attract twice nor repel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORE_ROWS_PER_BLOCK = 512
"""Number of rows of scores that exist at once; all of 4,096 pairs would take a gigabyte."""


def compute_row_infonce(scores: Tensor, positive_mask: Tensor, ignore_mask: Tensor) -> Tensor:
    """Return the mean of -log p over the positives of every row, float[n].

    p is the softmax over this positive and the negatives of its row, which are in neither mask; the
    other positives are left out. A row without a positive, or without a negative, gives 0.

    Args:
        scores: float[n, m], cosine / temperature.
        positive_mask: bool[n, m]; wins where both masks are set.
        ignore_mask: bool[n, m], pairs that are neither positive nor negative.
    """
    is_negative = ~(positive_mask | ignore_mask)
    negatives = scores.masked_fill(~is_negative, float("-inf")).logsumexp(1, keepdim=True)  # [n, 1]
    nll = torch.logaddexp(scores, negatives) - scores  # -log(e^s / (e^s + sum over negatives))
    num_positives = positive_mask.sum(1).clamp(min=1)
    return nll.masked_fill(~positive_mask, 0.0).sum(1) / num_positives


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    *,
    logit_scale: Tensor,
    positive_mask: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    rows: slice = slice(None),
    columns: slice = slice(None),
    world_size: int = 1,
) -> Tensor:
    """Return L_c, symmetric InfoNCE: the mean loss of the rows plus that of the columns.

    The loss of a row or column is that of `compute_row_infonce`; 0 if there is no positive at all.
    With several ranks, each one computes the rows and columns of its own embeddings.

    Args:
        queries: float[N, D], unit vectors (images) of all ranks, gathered with their gradient.
        targets: float[M, D], unit vectors (texts, then hard negatives) of all ranks, likewise.
        logit_scale: scalar, log(1 / temperature); see `clamp_logit_scale`.
        positive_mask: bool[N, M]. None: query i belongs to target i, and other targets are
            negatives. A row or column without a positive only serves as a negative of the others.
        ignore_mask: bool[N, M], pairs that are neither positive nor negative. None: there are none.
        rows: range of the queries of this rank.
        columns: range of the targets of this rank.
        world_size: number of ranks.

    Returns:
        A scalar, this rank's share: its rows / global number of rows with a positive + its columns
        / global number of columns with a positive, times `world_size`. The mean of the shares of
        all ranks is the loss.

    Example:
        >>> import torch
        >>> from vlduet.objectives import contrastive_loss
        >>> images = torch.nn.functional.normalize(torch.eye(3, 8), dim=1).requires_grad_()
        >>> captions = torch.eye(3, 8)
        >>> logit_scale = torch.tensor(1 / 0.07).log()
        >>> matching = contrastive_loss(images, captions, logit_scale=logit_scale)
        >>> shuffled = contrastive_loss(images, captions[[1, 2, 0]], logit_scale=logit_scale)
        >>> matching.item() < 0.001 < 10 < shuffled.item()
        True
        >>> shuffled.backward()
    """
    if positive_mask is None:
        shape = (len(queries), len(targets))
        positive_mask = torch.eye(*shape, dtype=torch.bool, device=queries.device)
    if ignore_mask is None:
        ignore_mask = torch.zeros_like(positive_mask)
    scale = logit_scale.exp()
    num_rows = max(int(positive_mask.any(1).sum()), 1)
    num_columns = max(int(positive_mask.any(0).sum()), 1)
    row_sum = _sum_row_infonce(
        queries[rows] * scale, targets, positive_mask[rows], ignore_mask[rows]
    )
    column_sum = _sum_row_infonce(
        targets[columns] * scale, queries, positive_mask.T[columns], ignore_mask.T[columns]
    )
    return (row_sum / num_rows + column_sum / num_columns) * world_size


def find_false_negatives(
    guide_scores: Tensor,
    positive_mask: Tensor,
    *,
    named_negatives: Tensor,
    content_kinds: tuple[Tensor, Tensor],
) -> Tensor:
    """Find pairs that a guide scores at least as high as both best positives: of row and column.

    The rule of GISTEmbed (arXiv 2402.16829), applied per kind of content: two texts score higher
    than any image and its text, so that only pairs of the same kinds are compared.

    Args:
        guide_scores: float[N, M], similarity of query and target according to the guide.
        positive_mask: bool[N, M].
        named_negatives: bool[N, M], pairs that the data names as negatives; never returned.
        content_kinds: int64[N] and int64[M], what queries and targets consist of.

    Returns:
        bool[N, M], for `ignore_mask`; False for positives. A pair (i, j) is compared with the
        positives of i whose target has the kind of j and those of j whose query has the kind of i:
        its score must reach the higher of the two maxima. Without any such positive it is False.
    """
    query_kinds, target_kinds = content_kinds
    positive_scores = guide_scores.masked_fill(~positive_mask, float("-inf"))
    threshold = torch.full_like(guide_scores, float("-inf"))
    for kind in target_kinds.unique():
        is_kind = (target_kinds == kind)[None, :]
        best = positive_scores.masked_fill(~is_kind, float("-inf")).amax(1, keepdim=True)
        threshold = torch.where(is_kind, torch.maximum(threshold, best), threshold)
    for kind in query_kinds.unique():
        is_kind = (query_kinds == kind)[:, None]
        best = positive_scores.masked_fill(~is_kind, float("-inf")).amax(0, keepdim=True)
        threshold = torch.where(is_kind, torch.maximum(threshold, best), threshold)
    is_as_high = (guide_scores >= threshold) & (threshold > float("-inf"))
    return is_as_high & ~positive_mask & ~named_negatives


def clamp_logit_scale(logit_scale: Tensor, min_temperature: float) -> Tensor:
    """Return min(logit_scale, log(1 / min_temperature)), so that the softmax stays soft.

    At the limit, the gradient passes only if descent leads away from it. That of `clamp` is zero in
    both directions, and a scale that momentum has carried across the limit would never come back.
    """
    clamped: Tensor = _ClampMax.apply(  # type: ignore[no-untyped-call]
        logit_scale, math.log(1 / min_temperature)
    )
    return clamped


def match_content_keys(left: list[str], right: list[str]) -> Tensor:
    """Return bool[len(left), len(right)]: which keys are equal.

    Keys become integers first: 4,096 x 4,096 comparisons of strings are slow.
    """
    numbers: dict[str, int] = {}
    left_ids = torch.tensor([numbers.setdefault(key, len(numbers)) for key in left]).long()
    right_ids = torch.tensor([numbers.setdefault(key, len(numbers)) for key in right]).long()
    return left_ids[:, None] == right_ids[None, :]


def _sum_row_infonce(
    scaled: Tensor, candidates: Tensor, positive_mask: Tensor, ignore_mask: Tensor
) -> Tensor:
    """Return the sum of `compute_row_infonce` over all rows, a scalar; 0 without rows.

    Beyond `SCORE_ROWS_PER_BLOCK` rows, the scores of one block exist at a time, and backward
    computes them again.

    Args:
        scaled: float[n, D], unit vectors / temperature.
        candidates: float[m, D], unit vectors.
        positive_mask: bool[n, m].
        ignore_mask: bool[n, m].
    """

    def sum_block(block: Tensor, positive: Tensor, ignore: Tensor) -> Tensor:
        return compute_row_infonce(block @ candidates.T, positive, ignore).sum()

    if len(scaled) <= SCORE_ROWS_PER_BLOCK:
        return sum_block(scaled, positive_mask, ignore_mask)
    blocks = zip(
        scaled.split(SCORE_ROWS_PER_BLOCK),
        positive_mask.split(SCORE_ROWS_PER_BLOCK),
        ignore_mask.split(SCORE_ROWS_PER_BLOCK),
        strict=True,
    )
    sums = [
        checkpoint(sum_block, *block, use_reentrant=False, preserve_rng_state=False)
        for block in blocks
    ]
    return torch.stack(sums).sum()


class _ClampMax(torch.autograd.Function):
    """min(x, limit) whose gradient beyond the limit is kept if descent makes x smaller."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.is_beyond = x >= limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Descent subtracts the gradient: a negative one would raise x further.
        return grad.masked_fill(ctx.is_beyond & (grad < 0), 0.0), None
