"""Sequences: tokens and images in order, labels to predict, and anchors where embeddings are read.

    tokens   <image> <image> <image>  A  red  apple  .  <eos>
    labels      -       -       -     A  red  apple  .  <eos>      -> language modelling
    anchors  [------- mean -------]                                -> embedding of the image
             [---------------------------------- last -----]       -> embedding of the whole prefix

A `PreparedImage` holds the output of the model's image processor for one `ImageRef`. This module
does not depend on any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vlduet.data.records import Part

IGNORE_INDEX = -100
"""Label of a token that carries no loss; `torch.nn.functional.cross_entropy` ignores it."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """Output of the image processor for one image, ready for the vision tower."""

    inputs: Mapping[str, torch.Tensor]
    """Inputs of the vision tower for this image alone, one row for each tile or patch."""
    num_tokens: int
    """Number of tokens that the image takes in a sequence, `interleaved_tokens` included."""
    cache_key: str
    """Hash of the image's content and of the processor; equal keys imply equal vision features."""
    grid: tuple[int, int] | None = None
    """Rows and columns of its tokens for two-dimensional position ids; None for other models."""
    interleaved_tokens: Mapping[int, int] = field(default_factory=dict)
    """Ordinary tokens among the image's tokens, such as row ends: offset in the image -> token id.

    Vision features fill all other tokens of the image."""

    @property
    def num_features(self) -> int:
        """Number of tokens that vision features fill."""
        return self.num_tokens - len(self.interleaved_tokens)

    @property
    def feature_span(self) -> tuple[int, int]:
        """Offsets [start, end) from the first feature token to the last one, relative to the image.

        Interleaved tokens before the first and after the last feature are excluded.
        """
        offsets = [i for i in range(self.num_tokens) if i not in self.interleaved_tokens]
        return offsets[0], offsets[-1] + 1

    def token_ids(self, image_token_id: int) -> list[int]:
        """Return the `num_tokens` token ids of the image; feature tokens get `image_token_id`."""
        return [self.interleaved_tokens.get(i, image_token_id) for i in range(self.num_tokens)]


@dataclass(frozen=True, slots=True)
class Slice:
    """One image or text of an anchor's prefix, with its embeddings by frozen encoders (Sugar)."""

    part: Part
    """The image or the text itself."""
    content_key: str
    """Hash of the content: equal keys mean equal content."""
    features: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Role of a frozen encoder -> float32[d], unit length; empty before the encoders have run."""


def join_content_keys(slices: tuple[Slice, ...]) -> str:
    """Return the content key of a prefix, by the keys of its slices."""
    return "|".join(part.content_key for part in slices)


@dataclass(frozen=True, slots=True)
class Anchor:
    """Span [start, end) of a sequence whose mean hidden state becomes an embedding.

    Last-token pooling is a span of one token.
    """

    start: int
    """Index of the first token."""
    end: int
    """Index after the last token."""
    role: str
    """Kind of content that the embedding stands for: image, text, query, positive, negative, ..."""
    record_name: str
    """Name of the record (`Sample.record_name`); contrastive pairs are anchors of one record."""
    content_key: str
    """Hash of the content; anchors with equal keys are never each other's negatives."""
    slices: tuple[Slice, ...] = ()
    """Images and texts up to the anchor's end, for losses that compare contents; else empty."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One token sequence of the forward pass, before padding and packing."""

    token_ids: tuple[int, ...]
    """T token ids; the tokens of an image hold the image token id and its interleaved tokens."""
    labels: tuple[int, ...]
    """T labels: `token_ids[t]` where token t must be predicted from its prefix, else
    IGNORE_INDEX."""
    anchors: tuple[Anchor, ...] = ()
    """Spans where embeddings are read."""
    images: tuple[tuple[int, PreparedImage], ...] = ()
    """Pairs (index of the image's first token, image), in order of position."""
    num_cut_tokens: int = field(default=0, compare=False)
    """Number of tokens of texts that were cut off to keep to a length limit."""

    def __post_init__(self) -> None:
        """Assert that labels, anchors and tokens fit together."""
        length = len(self.token_ids)
        assert length == len(self.labels)
        assert all(0 <= a.start < a.end <= length for a in self.anchors), (
            "an anchor lies outside its sequence"
        )
        assert not self.labels or self.labels[0] == IGNORE_INDEX, (
            "the first token has no prefix that could predict it"
        )

    def __len__(self) -> int:
        """Return T, the number of tokens."""
        return len(self.token_ids)

    @property
    def num_labels(self) -> int:
        """Number of tokens that carry a language-modelling loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


def trim(sequence: Sequence, *, labels: bool, anchors: bool) -> Sequence | None:
    """Return the shortest prefix of a sequence that yields the requested outputs.

    Attention is causal, so tokens after the last label and the last anchor influence neither. An
    image is never cut: it is kept as a whole or dropped.

    Args:
        sequence: the sequence; it is not modified.
        labels: keep the labels; False replaces all of them by IGNORE_INDEX.
        anchors: keep the anchors; False drops all of them.

    Returns:
        The prefix, or None where the sequence has none of the requested outputs.
    """
    kept_labels = sequence.labels if labels else (IGNORE_INDEX,) * len(sequence)
    kept_anchors = sequence.anchors if anchors else ()
    ends = [i + 1 for i, label in enumerate(kept_labels) if label != IGNORE_INDEX]
    ends += [anchor.end for anchor in kept_anchors]
    if not ends:
        return None
    end = max(ends)
    for start, image in sequence.images:
        if start < end:
            end = max(end, start + image.num_tokens)
    images = tuple((start, image) for start, image in sequence.images if start < end)
    return Sequence(
        sequence.token_ids[:end], kept_labels[:end], kept_anchors, images, sequence.num_cut_tokens
    )


def compute_position_ids(sequence: Sequence) -> torch.Tensor:
    """Return the position ids of a sequence: int64[1, T], or int64[3, T] where images have a grid.

    Without grids they count 0, 1, ..., T - 1. With grids the three rows are time, row and column of
    the multimodal rotary embedding of Qwen2-VL (arXiv 2409.12191): equal and increasing on text; an
    image has one time, its tokens count rows and columns from there, and the text after it
    continues after the larger of both. Either all images of a sequence have a grid or none, and a
    grid has as many cells as its image has tokens; otherwise an assertion fails.
    """
    if not any(image.grid for _, image in sequence.images):
        return torch.arange(len(sequence))[None]
    position_ids = torch.empty(3, len(sequence), dtype=torch.long)
    filled = 0  # tokens that have their position
    next_position = 0
    for start, image in sequence.images:
        assert image.grid is not None and math.prod(image.grid) == image.num_tokens
        rows, columns = image.grid
        position_ids[:, filled:start] = next_position + torch.arange(start - filled)
        next_position += start - filled
        filled = start + image.num_tokens
        position_ids[0, start:filled] = next_position
        row_index = torch.arange(rows).repeat_interleave(columns)
        position_ids[1, start:filled] = next_position + row_index
        position_ids[2, start:filled] = next_position + torch.arange(columns).repeat(rows)
        next_position += max(rows, columns)
    position_ids[:, filled:] = next_position + torch.arange(len(sequence) - filled)
    return position_ids
