"""Next-token cross entropy at the supervised positions only, in chunks, so that no full [tokens, vocabulary] tensor lives.

The logits of one chunk are made, used and thrown away; backward makes them again. With a vocabulary of 50-150 thousand and
long captions they would be the largest tensor of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

POSITIONS_PER_CHUNK = 1024
"""Supervised positions whose logits live at one time."""


def softcap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """c tanh(logits / c), which some models have behind their LM head (Gemma 4); with None the logits themselves."""
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
    """Negative log likelihood of every target, in nats.

    Args:
        hidden: float[N, D], final hidden states of the positions *before* the targets.
        weight: float[V, D], the LM head.
        targets: int[N].
        bias: float[V] where the LM head has one.
        cap: c, where logits are c tanh(logits / c).

    Returns:
        float32[N] (float64 stays float64).
    """

    def nll(states: Tensor, wanted: Tensor) -> Tensor:
        logits = softcap_logits(F.linear(states, weight, bias), logit_softcap)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, wanted, reduction="none")

    if len(targets) == 0:
        return hidden.sum(1).float()  # [0], still part of the graph
    if len(targets) <= chunk_size:
        return nll(hidden, targets)
    parts = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    remake = torch.is_grad_enabled()
    found = [checkpoint(nll, h, t, use_reentrant=False) if remake else nll(h, t) for h, t in parts]
    return torch.cat(found)


def language_loss(nll: Tensor, *, global_token_count: float, world_size: int = 1) -> Tensor:
    """This rank's share of the mean loss per supervised token of the *global* batch (see `vlduet.distributed`).

    A mean per rank would weigh a token by how few its rank happens to have; unequal answer lengths then bend the gradient.
    """
    return nll.sum() * (world_size / max(global_token_count, 1.0))
