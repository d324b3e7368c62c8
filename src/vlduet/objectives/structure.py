"""L_d of Sugar: the similarities of the embeddings become those that frozen encoders tell (arXiv 2411.00304, eq. 3).

L_d = (1/n) sum_ij (m^r_ij - m^l_ij)^2        m^r_ij = cos(r_i, r_j), m^l: vlduet.objectives.sugar_targets
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

StructureLossKind = Literal["mse", "kl"]


def structure_loss(
    embeddings: Tensor,
    all_embeddings: Tensor,
    *,
    target: Tensor,
    first_row: int = 0,
    kind: StructureLossKind = "mse",
    temperature: float = 0.1,
    n_ref: int | None = None,
    world_size: int = 1,
) -> Tensor:
    """This rank's share of L_d of the global batch (see `vlduet.distributed`).

    Args:
        rows: float[R, E] unit vectors of this rank; everything: float[N, E], those of all ranks, gathered with gradient.
        target: float[R, N], without gradient.
        begin: where `rows` stand in `everything`.
        loss: `mse`, the paper's. `kl`: mean over i of the symmetric Kullback-Leibler divergence (half the sum of both
            directions) between the softmaxes of row i of target and prediction, j = i left out: only the order and
            the distances of the others are learned, not their level.
        temperature: of the softmaxes.
        n_ref: the paper's (1/n) sum over n^2 terms grows with n. A number n_ref gives mean * n_ref instead: the same
            where n = n_ref, and a weight keeps its meaning where n varies. `kl` is a mean over rows and has no need of it.
        world_size: the share is this rank's sum / global count * world_size.

    Returns:
        A scalar; 0, part of the graph, where there is nothing to compare.
    """
    count = len(all_embeddings)
    predicted = embeddings @ all_embeddings.T  # [R, N]
    if len(embeddings) == 0 or (kind == "kl" and count == 1):
        return predicted.sum() * 0.0
    if kind == "mse":
        factor = 1 / count if n_ref is None else n_ref / count**2
        return (predicted - target).square().sum() * (factor * world_size)
    number = torch.arange(len(embeddings), device=embeddings.device)
    itself = torch.zeros_like(target, dtype=torch.bool)
    itself[number, first_row + number] = True

    def log_softmax(values: Tensor) -> Tensor:
        return (
            (values / temperature)
            .masked_fill(itself, float("-inf"))
            .log_softmax(1)
            .masked_fill(itself, 0.0)
        )

    p, q = log_softmax(target), log_softmax(predicted)
    # (p - q) log(p / q) summed is the sum of both directions; exp(0) of the masked cells cancels.
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(1) / 2  # [R]
    return divergence.sum() * (world_size / count)
