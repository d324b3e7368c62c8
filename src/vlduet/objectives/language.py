"""Next-token cross entropy at the supervised positions, in chunks.

With a vocabulary of 50 to 150 thousand tokens and long captions, the logits would be the largest
tensor of a training step. Those of one chunk are computed, used and freed; backward computes them
again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

POSITIONS_PER_CHUNK = 1024
"""Number of supervised positions whose logits exist at once."""


def softcap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Return c tanh(logits / c) with c = `softcap`, as after the LM head of Gemma; None: logits."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def compute_token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    chunk_size: int = POSITIONS_PER_CHUNK,
) -> Tensor:
    """Return the negative log likelihood of every target token, in nats.

    Args:
        hidden: float[N, D], final hidden states at the positions *before* the targets.
        weight: float[V, D], the LM head.
        targets: int64[N], token ids; -100 gives 0.
        bias: float[V], of the LM head.
        logit_softcap: see `softcap_logits`.
        chunk_size: number of positions whose logits exist at once; backward computes the logits of
            several chunks again.

    Returns:
        float32[N]; float64 if the logits are. Without targets, an empty tensor that is part of the
        graph of `hidden`.

    Raises:
        ValueError: `hidden` and `targets` differ in length.
    """

    def compute_nll(states: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = softcap_logits(F.linear(states, weight, bias), logit_softcap)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.cross_entropy(logits, chunk_targets, reduction="none")

    if len(targets) == 0:
        return hidden.sum(1).float()
    if len(targets) <= chunk_size:
        return compute_nll(hidden, targets)
    parts = []
    for states, chunk in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(compute_nll, states, chunk, use_reentrant=False))
        else:
            parts.append(compute_nll(states, chunk))
    return torch.cat(parts)


def language_loss(nll: Tensor, *, global_token_count: float, world_size: int = 1) -> Tensor:
    """Return this rank's share of the mean loss per supervised token of the *global* batch.

    A mean per rank would weigh a token by how few tokens its rank happens to have, so that unequal
    answer lengths would distort the gradient. The mean of the shares of all ranks is the loss.

    Args:
        nll: float[S], from `compute_token_nll`, of this rank's tokens.
        global_token_count: number of supervised tokens of all ranks; 0 counts as 1.
        world_size: number of ranks.

    Returns:
        A scalar: sum(nll) / global_token_count * world_size.
    """
    return nll.sum() * (world_size / max(global_token_count, 1.0))
