"""Symmetric InfoNCE with several positives, hard negatives and masks by content (VladVA eq. for L_c; CLIP, SupCon).

    s_ij = <a_i, b_j> / tau        L = (1/n) sum_i [ -log softmax_row(s)_i+ - log softmax_col(s)_i+ ]

Where several columns are positives of a row (a repeated caption is a positive, not a false negative), the row's loss is the
mean of its positives' -log p, each against *itself and the negatives*: another positive never stands in the denominator, so
duplicates neither attract twice nor repel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCORE_ROWS_PER_BLOCK = 512
"""Rows of scores that live at a time: 4,096 pairs would take a gigabyte otherwise."""


def compute_row_infonce(scores: Tensor, positive: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Mean over a row's positives of -log p(positive), one number a row.

    Args:
        scores: float[n, m], cosine / temperature.
        positive: bool[n, m].
        ignore: bool[n, m], pairs that are neither positive nor negative (same content, unknown relevance).

    Returns:
        float[n]; rows without a positive give 0.
    """
    negative = ~positive if ignore is None else ~(positive | ignore)
    rest = scores.masked_fill(~negative, float("-inf")).logsumexp(1, keepdim=True)  # [n, 1]
    each = torch.logaddexp(scores, rest) - scores  # -log( e^s / (e^s + sum of negatives) )
    count = positive.sum(1).clamp(min=1)
    return each.masked_fill(~positive, 0.0).sum(1) / count


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    *,
    logit_scale: Tensor,
    positive_mask: Tensor,
    ignore_mask: Tensor | None = None,
    rows: slice = slice(None),
    columns: slice = slice(None),
    world_size: int = 1,
) -> Tensor:
    """L_c of the global batch; each rank computes its own rows and columns of it.

    Args:
        left: float[N, D] unit vectors of all ranks (images), gathered with gradient.
        right: float[M, D] unit vectors of all ranks (texts, then hard negatives), gathered with gradient.
        logit_scale: scalar, log(1 / temperature), already limited by the caller.
        positive: bool[N, M]. A row or column without a positive takes part as a negative only.
        ignore: bool[N, M], pairs that are neither positive nor negative.
        rows: the rows of `left` that are this rank's; columns: the columns of `right` that are.

    Returns:
        This rank's share: sum over its rows and columns / global number of rows with a positive, times world_size.
    """
    scale = logit_scale.exp()
    pairs = max(int(positive_mask.any(1).sum()), 1)
    captions = max(int(positive_mask.any(0).sum()), 1)
    ignore_mask = torch.zeros_like(positive_mask) if ignore_mask is None else ignore_mask
    forward = (
        _summed(queries[rows] * scale, targets, positive_mask[rows], ignore_mask[rows]) / pairs
    )
    backward = (
        _summed(targets[columns] * scale, queries, positive_mask.T[columns], ignore_mask.T[columns])
        / captions
    )
    return (forward + backward) * world_size


def find_false_negatives(
    guide_scores: Tensor,
    positive_mask: Tensor,
    *,
    named_negatives: Tensor,
    content_kinds: tuple[Tensor, Tensor],
) -> Tensor:
    """Pairs that a guide finds at least as alike as the pairs that both of the two have (as GISTEmbed, arXiv 2402.16829).

    Args:
        alike: float[N, M], how alike the guide finds what asks and what answers.
        positive: bool[N, M].
        told: bool[N, M], pairs that somebody said are wrong: no guide knows better.
        kinds: int64[N] and int64[M]: what each is made of. Two texts are more alike than any image and its text, so only
            pairs of the same kinds are compared.

    Returns:
        bool[N, M], for `ignore`. Where neither has a pair of these kinds, nothing is said.
    """
    own = guide_scores.masked_fill(~positive_mask, float("-inf"))
    demanded = torch.full_like(guide_scores, float("-inf"))
    for side, kind in (
        (1, content_kinds[1]),
        (0, content_kinds[0]),
    ):  # of a row its pairs by the other's kind, then of a column
        for which in kind.unique():
            same = kind == which
            best = own.masked_fill(~(same[None, :] if side else same[:, None]), float("-inf")).amax(
                side, keepdim=True
            )
            demanded = torch.where(
                same[None, :] if side else same[:, None], torch.maximum(demanded, best), demanded
            )
    return (
        (guide_scores >= demanded) & (demanded > float("-inf")) & ~positive_mask & ~named_negatives
    )


def _summed(asking: Tensor, answers: Tensor, positive: Tensor, ignore: Tensor) -> Tensor:
    """Sum of `directed_infonce` over all rows, of which BLOCK live at a time: backward computes a block's scores again."""

    def block(some: Tensor, positive: Tensor, ignore: Tensor) -> Tensor:
        return compute_row_infonce(some @ answers.T, positive, ignore).sum()

    parts = list(
        zip(*(rows.split(SCORE_ROWS_PER_BLOCK) for rows in (asking, positive, ignore)), strict=True)
    )
    if len(parts) == 1:
        return block(*parts[0])
    sums = [
        checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False) for part in parts
    ]
    return torch.stack(sums).sum()


def clamp_logit_scale(logit_scale: Tensor, min_temperature: float) -> Tensor:
    """log(1/tau) with tau >= floor, so that the softmax cannot sharpen without end.

    At the floor only a gradient that leads away from it passes. A clamp's is zero there in both directions, and a
    temperature that momentum has carried across would never come back.
    """
    limit: Tensor = _ClampMax.apply(logit_scale, math.log(1 / min_temperature))  # type: ignore[no-untyped-call]
    return limit


class _ClampMax(torch.autograd.Function):
    """min(x, most), which can be left again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: float) -> Tensor:
        ctx.beyond = x >= most
        return x.clamp(max=most)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.masked_fill(
            ctx.beyond & (grad < 0), 0.0
        ), None  # descent would raise it further


def match_content_keys(left: list[str], right: list[str]) -> Tensor:
    """bool[len(left), len(right)]: equal keys. Integers by dictionary first: 4,096 x 4,096 string comparisons are slow."""
    number: dict[str, int] = {}
    a = torch.tensor([number.setdefault(k, len(number)) for k in left], dtype=torch.long)
    b = torch.tensor([number.setdefault(k, len(number)) for k in right], dtype=torch.long)
    return a[:, None] == b[None, :]
