"""What one forward leaves to the losses: embeddings at the anchors, negative log likelihoods at the labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlduet.data.batches import Batch
from vlduet.data.sequences import IGNORE_INDEX, Anchor


@dataclass(frozen=True, slots=True)
class Readout:
    """One forward, two readings."""

    embeddings: Tensor
    """float[A, E], unit length."""
    anchors: tuple[Anchor, ...]
    """The A anchors' facts, in the same order."""
    nll: Tensor
    """float[S], nats, one a supervised token, sequence after sequence."""

    def select_roles(self, *roles: str) -> tuple[Tensor, list[Anchor]]:
        """The embeddings and anchors of these roles."""
        chosen = [i for i, anchor in enumerate(self.anchors) if anchor.role in roles]
        index = torch.tensor(chosen, dtype=torch.long, device=self.embeddings.device)
        return self.embeddings[index], [self.anchors[i] for i in chosen]


def create_empty_readout(dim: int, *, like: Tensor) -> Readout:
    """What a rank without a usable record contributes: nothing, in the right shapes, of the kind and place of `like`."""
    # Both want a gradient: the backward of the gather is a collective in which every rank must take part, and a step of
    # which this rank has nothing goes backward, too.
    return Readout(like.new_zeros(0, dim).requires_grad_(), (), like.new_zeros(0).requires_grad_())


def concatenate_readouts(readouts: list[Readout]) -> Readout:
    """Several forwards' readings as one, in order; at least one of them (`empty_readout` counts)."""
    return Readout(
        torch.cat([readout.embeddings for readout in readouts]),
        tuple(anchor for readout in readouts for anchor in readout.anchors),
        torch.cat([readout.nll for readout in readouts]),
    )


def pool_hidden_states(
    hidden: Tensor, spans: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
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
    found = hidden[spans[:, 0], spans[:, 1]].to(
        dtype or hidden.dtype
    )  # all that a span of one token needs
    (several,) = (spans[:, 2] - spans[:, 1] > 1).nonzero(as_tuple=True)
    if len(several) == 0:
        return found
    # Texts are read at one token: laid out as long as an image, a batch of them would take gigabytes.
    long = spans[several]
    at = long[:, 1, None] + torch.arange(
        int((long[:, 2] - long[:, 1]).max()), device=spans.device
    )  # [S, L]
    inside = at < long[:, 2, None]
    states = hidden[long[:, 0, None], at.clamp(max=hidden.shape[1] - 1)].to(
        found.dtype
    )  # [S, L, D]
    return found.index_copy(
        0, several, (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
    )


def find_supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and position of every supervised token; what predicts it stands one position before."""
    rows, at = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, at


class EmbeddingHead(nn.Module):
    """r = MLP(d), unit length.

    `kind`: mlp (Linear-GELU-Linear, Sugar), linear, none (VladVA reads d itself), or split: a linear map of d and another
    of the vision tower's own features (FROMAGe).
    """

    def __init__(self, kind: str, width: int, dim: int, *, vision_width: int = 0):
        super().__init__()
        self.kind, self.dim = kind, width if kind == "none" else dim
        layers: dict[str, nn.Module] = {
            "none": nn.Identity(),
            "linear": nn.Linear(width, dim),
            "mlp": nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)),
        }
        self.layers = nn.Linear(width, dim) if kind == "split" else layers[kind]
        self.vision = nn.Linear(vision_width, dim) if kind == "split" else None

    def forward(self, pooled: Tensor) -> Tensor:
        """float[A, D] -> float[A, E], unit length."""
        found: Tensor = nn.functional.normalize(self.layers(pooled), dim=-1)
        return found

    def embed_vision_features(self, pooled: Tensor) -> Tensor:
        """Vision features float[A, Dv] -> float[A, E], unit length."""
        assert self.vision is not None, "only a split head reads the tower"
        return nn.functional.normalize(self.vision(pooled[:, : self.vision.in_features]), dim=-1)


def merge_vision_embeddings(
    of_trunk: Tensor, head: EmbeddingHead, batch: Batch, *, at: Tensor, features: Tensor
) -> Tensor:
    """Embeddings of all anchors, float[A, E]: those of the trunk, and the means of images' vision features.

    Args:
        of_trunk: float[n, E], of the other anchors in their order.
        at: bool[A], the anchors that are read in the tower; each stands at an image's tokens.
        features: float[tokens, Dv], of the batch's images.
    """
    rows, starts, ends = batch.anchor_spans[at].unbind(1)
    # Of the feature at a token, or the last one before it: row-major, as images fill their places.
    order = batch.image_mask.flatten().cumsum(0) - 1
    first, last = (order[rows * batch.token_ids.shape[1] + place] for place in (starts, ends - 1))
    spans = torch.stack([torch.zeros_like(first), first, last + 1], 1)
    seen = head.embed_vision_features(
        pool_hidden_states(features[None], spans, dtype=of_trunk.dtype)
    )
    found = of_trunk.new_zeros(len(at), head.dim).masked_scatter(~at[:, None], of_trunk)
    return found.masked_scatter(at[:, None], seen)
