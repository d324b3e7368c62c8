"""What one forward leaves to the losses: embeddings at the anchors, negative log likelihoods at the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlduet.data.sequences import IGNORE, Anchor


@dataclass(frozen=True, slots=True)
class Readout:
    """One forward, two readings."""

    embeddings: Tensor
    """float[A, E], unit length."""
    anchors: tuple[Anchor, ...]
    """The A anchors' facts, in the same order."""
    nll: Tensor
    """float[S], nats, one a supervised token, sequence after sequence."""

    def of(self, *roles: str) -> tuple[Tensor, list[Anchor]]:
        """The embeddings and anchors of these roles."""
        chosen = [i for i, anchor in enumerate(self.anchors) if anchor.role in roles]
        index = torch.tensor(chosen, dtype=torch.long, device=self.embeddings.device)
        return self.embeddings[index], [self.anchors[i] for i in chosen]


def empty_readout(dim: int, *, like: Tensor) -> Readout:
    """What a rank without a usable record contributes: nothing, in the right shapes, of the kind and place of `like`."""
    # It wants a gradient, because the backward of the gather is a collective in which every rank must take part.
    return Readout(like.new_zeros(0, dim).requires_grad_(), (), like.new_zeros(0))


def pool(hidden: Tensor, spans: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Mean of the hidden states of every span.

    Args:
        hidden: float[B, T, D].
        spans: int64[A, 3], row, start, end. A span of one token is last-token pooling by index.
        dtype: of the result, and of the sum that it is: a mean in half precision loses digits.

    Returns:
        float[A, D]
    """
    if len(spans) == 0:
        return hidden[:0, 0].to(dtype or hidden.dtype)  # part of the graph: see `empty_readout`
    longest = int((spans[:, 2] - spans[:, 1]).max())
    at = spans[:, 1, None] + torch.arange(longest, device=spans.device)  # [A, L]
    inside = at < spans[:, 2, None]
    states = hidden[spans[:, 0, None], at.clamp(max=hidden.shape[1] - 1)].to(dtype or hidden.dtype)  # [A, L, D]
    return (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and position of every supervised token; what predicts it stands one position before."""
    rows, at = (labels != IGNORE).nonzero(as_tuple=True)
    return rows, at


class EmbeddingHead(nn.Module):
    """r = MLP(d), unit length. `kind`: mlp (Linear-GELU-Linear, Sugar), linear, or none (VladVA reads d itself)."""

    def __init__(self, kind: str, width: int, dim: int):
        super().__init__()
        self.kind, self.dim = kind, width if kind == "none" else dim
        layers: dict[str, nn.Module] = {
            "none": nn.Identity(),
            "linear": nn.Linear(width, dim),
            "mlp": nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)),
        }
        self.layers = layers[kind]

    def forward(self, pooled: Tensor) -> Tensor:
        """float[A, D] -> float[A, E], unit length."""
        found: Tensor = nn.functional.normalize(self.layers(pooled), dim=-1)
        return found
