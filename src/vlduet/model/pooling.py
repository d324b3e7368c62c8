"""The two readings of a forward pass: embeddings at anchors, negative log-likelihoods at labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlduet.data.batches import Batch
from vlduet.data.sequences import IGNORE_INDEX, Anchor
from vlduet.errors import ConfigError
from vlduet.library_errors import is_lack_of_memory


@dataclass(frozen=True, slots=True)
class Readout:
    """Outputs of one forward pass, or of several that were concatenated."""

    embeddings: Tensor
    """float[A, E], unit length."""
    anchors: tuple[Anchor, ...]
    """The A anchors, in the order of `embeddings`."""
    nll: Tensor
    """float[S], negative log-likelihood in nats of every supervised token, sequence after
    sequence."""

    def select_roles(self, *roles: str) -> tuple[Tensor, list[Anchor]]:
        """Return embeddings float[a, E] and anchors whose role is one of `roles`, in order."""
        indices = [i for i, anchor in enumerate(self.anchors) if anchor.role in roles]
        index = torch.tensor(indices, dtype=torch.long, device=self.embeddings.device)
        return self.embeddings[index], [self.anchors[i] for i in indices]


def create_empty_readout(dim: int, *, like: Tensor) -> Readout:
    """Return the readout of a process that has no usable record: no embedding and no label.

    Both tensors require a gradient: the backward pass of the gather is a collective in which every
    process must take part, and a step must have a graph even if this process contributes nothing to
    it.

    Args:
        dim: E, width of the embeddings.
        like: tensor whose dtype and device the readout gets.
    """
    return Readout(like.new_zeros(0, dim).requires_grad_(), (), like.new_zeros(0).requires_grad_())


def concatenate_readouts(readouts: list[Readout]) -> Readout:
    """Return the readouts of several forward passes (at least one) as one, in order."""
    return Readout(
        torch.cat([readout.embeddings for readout in readouts]),
        tuple(anchor for readout in readouts for anchor in readout.anchors),
        torch.cat([readout.nll for readout in readouts]),
    )


def pool_hidden_states(
    hidden: Tensor, spans: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the mean hidden state of every span, float[A, D], in order.

    Args:
        hidden: float[B, T, D].
        spans: int64[A, 3], row, start and end (exclusive), at least one token each. A span of one
            token is last-token pooling. Without spans the result is empty but still part of the
            graph (see `create_empty_readout`).
        dtype: dtype of the sum and of the result, by default that of `hidden`; a mean in half
            precision would lose digits.
    """
    if len(spans) == 0:
        return hidden[:0, 0].to(dtype or hidden.dtype)
    rows, starts, ends = spans.unbind(1)
    pooled = hidden[rows, starts].to(dtype or hidden.dtype)  # [A, D], the result for single tokens
    (long_spans,) = (ends - starts > 1).nonzero(as_tuple=True)
    if len(long_spans) == 0:
        return pooled
    # Only the long spans are gathered at full length: texts have one token, images hundreds, and
    # padding all spans to the longest would take gigabytes.
    rows, starts, ends = spans[long_spans].unbind(1)
    max_length = int((ends - starts).max())
    positions = starts[:, None] + torch.arange(max_length, device=spans.device)  # [S, L]
    is_inside = positions < ends[:, None]
    positions = positions.clamp(max=hidden.shape[1] - 1)
    states = hidden[rows[:, None], positions].to(pooled.dtype)  # [S, L, D]
    sums = (states * is_inside[..., None]).sum(1)  # [S, D]
    return pooled.index_copy(0, long_spans, sums / is_inside.sum(1, keepdim=True))


def find_supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of all labels in int64[B, T], int64[S] each.

    They are in row-major order. The hidden state one position before a label predicts it.
    """
    rows, columns = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, columns


HEAD_KINDS = ("none", "linear", "mlp", "split")
"""Kinds of `EmbeddingHead`."""


class EmbeddingHead(nn.Module):
    """Map from pooled hidden states to embeddings of unit length, r = norm(head(d))."""

    def __init__(self, kind: str, width: int, dim: int, *, vision_width: int = 0):
        """Create the layers, in float32 on the CPU, initialised by torch's global generator.

        Args:
            kind: `mlp` (Linear-GELU-Linear, Sugar), `linear`, `none` (VladVA embeds d itself), or
                `split`: one linear map of d and another of the vision tower's features (FROMAGe).
                Any other kind raises KeyError.
            width: D, width of the hidden states.
            dim: E, width of the embeddings; `none` has E = D instead.
            vision_width: width of the vision features that `split` reads.

        Raises:
            ConfigError: there is too little memory for `dim`.
        """
        super().__init__()
        self.kind = kind
        self.dim = width if kind == "none" else dim
        try:
            self._create_layers(kind, width, dim, vision_width=vision_width)
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_memory(error):
                raise
            message = f"too little memory for dim {dim}"
            raise ConfigError(message, place="model.dim", fix="Use a smaller dim") from error

    def _create_layers(self, kind: str, width: int, dim: int, *, vision_width: int) -> None:
        """Set the layers; the arguments are those of `__init__`."""
        # All variants are created, whichever is used: the random numbers drawn after them stay the
        # same.
        layers: dict[str, nn.Module] = {
            "none": nn.Identity(),
            "linear": nn.Linear(width, dim),
            "mlp": nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)),
        }
        # Attribute names are tensor names in saved models.
        self.layers = nn.Linear(width, dim) if kind == "split" else layers[kind]
        self.vision = nn.Linear(vision_width, dim) if kind == "split" else None

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the embeddings float[A, E], unit length, of pooled hidden states float[A, D]."""
        embeddings: Tensor = nn.functional.normalize(self.layers(pooled), dim=-1)
        return embeddings

    def embed_vision_features(self, pooled: Tensor) -> Tensor:
        """Return the embeddings float[A, E], unit length, of pooled vision features float[A, Dv].

        Only the first `vision_width` features are read. Only a `split` head has this map.
        """
        assert self.vision is not None, "only a split head embeds vision features"
        pooled = pooled[:, : self.vision.in_features]
        return nn.functional.normalize(self.vision(pooled), dim=-1)


def merge_vision_embeddings(
    text_embeddings: Tensor,
    head: EmbeddingHead,
    batch: Batch,
    *,
    is_vision: Tensor,
    features: Tensor,
) -> Tensor:
    """Return the embeddings float[A, E], unit length, of all anchors, from either of two sources.

    Args:
        text_embeddings: float[n, E], embeddings of the anchors that the language model embeds, in
            order.
        head: head with a map for vision features; any other kind fails an assertion.
        batch: the whole batch with all A anchors, in whose order the result is.
        is_vision: bool[A], the anchors that are embedded as the mean of their image's vision
            features; each lies on image tokens.
        features: float[tokens, Dv], vision features of all images of the batch, in order.
    """
    rows, starts, ends = batch.anchor_spans[is_vision].unbind(1)
    # Index of the feature at every token, or of the last one before it: features fill the image
    # tokens in row-major order.
    feature_index = batch.image_mask.flatten().cumsum(0) - 1  # [B * T]
    row_starts = rows * batch.token_ids.shape[1]
    first = feature_index[row_starts + starts]
    last = feature_index[row_starts + ends - 1]
    spans = torch.stack([torch.zeros_like(first), first, last + 1], 1)
    pooled = pool_hidden_states(features[None], spans, dtype=text_embeddings.dtype)
    vision_embeddings = head.embed_vision_features(pooled)
    embeddings = text_embeddings.new_zeros(len(is_vision), head.dim)  # [A, E]
    embeddings = embeddings.masked_scatter(~is_vision[:, None], text_embeddings)
    return embeddings.masked_scatter(is_vision[:, None], vision_embeddings)
