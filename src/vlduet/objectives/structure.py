"""Structure loss L_d of Sugar (arXiv 2411.00304, eq. 3).

The similarities of the embeddings learn those that frozen encoders give:

    L_d = (1/n) sum_ij (m^r_ij - m^l_ij)^2

with m^r_ij = cos(r_i, r_j), and m^l from `vlduet.objectives.sugar_targets`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StructureLossKind = Literal["mse", "kl"]


def structure_loss(
    embeddings: Tensor,
    target: Tensor,
    *,
    all_embeddings: Tensor | None = None,
    first_row: int = 0,
    kind: StructureLossKind = "mse",
    temperature: float = 0.1,
    n_ref: int | None = None,
    world_size: int = 1,
) -> Tensor:
    """Return L_d; with several ranks, this rank's share of L_d of the global batch.

    Args:
        embeddings: float[R, E], unit vectors of this rank.
        target: float[R, N], target similarities, without gradient.
        all_embeddings: float[N, E], unit vectors of all ranks, gathered with their gradient. None:
            `embeddings`, with N = R.
        first_row: index of the first row of `embeddings` in `all_embeddings`.
        kind: `mse`, the paper's. `kl`: mean over i of the symmetric Kullback-Leibler divergence
            (half the sum of both directions) of the softmaxes of row i of target and prediction,
            without j = i. It learns the order and the differences of similarities, not their level.
        temperature: of the softmaxes of `kl`.
        n_ref: the paper's (1/n) sum over n^2 terms grows with n. With a number, `mse` is mean *
            n_ref instead, which equals it for n = n_ref, and a loss weight keeps its meaning where
            n varies. Not used by `kl`, which is a mean over rows.
        world_size: number of ranks. The mean of the shares of all ranks is the loss.

    Returns:
        A scalar; 0, still part of the graph, if there is nothing to compare.

    Example:
        >>> import torch
        >>> from vlduet.objectives import structure_loss
        >>> weights = torch.eye(3, 4, requires_grad=True)
        >>> embeddings = torch.nn.functional.normalize(weights, dim=1)
        >>> target = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> loss = structure_loss(embeddings, target)
        >>> round(loss.item(), 4)  # (0.8 ** 2 + 0.8 ** 2) / 3
        0.4267
        >>> loss.backward()
    """
    if all_embeddings is None:
        all_embeddings = embeddings
    count = len(all_embeddings)
    predicted = embeddings @ all_embeddings.T  # [R, N]
    if len(embeddings) == 0 or (kind == "kl" and count == 1):
        return predicted.sum() * 0.0
    if kind == "mse":
        factor = 1 / count if n_ref is None else n_ref / count**2
        return (predicted - target).square().sum() * (factor * world_size)
    row = torch.arange(len(embeddings), device=embeddings.device)
    is_self = torch.zeros_like(target, dtype=torch.bool)
    is_self[row, first_row + row] = True

    def log_softmax(values: Tensor) -> Tensor:
        logits = (values / temperature).masked_fill(is_self, float("-inf"))
        return logits.log_softmax(1).masked_fill(is_self, 0.0)

    log_p = log_softmax(target)
    log_q = log_softmax(predicted)
    # (p - q) log(p / q), summed, is the sum of both directions; masked cells give exp(0) - exp(0).
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1) / 2  # [R]
    return divergence.sum() * (world_size / count)
