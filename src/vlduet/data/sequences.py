"""A sequence: tokens and images in order, the labels to predict and the anchors where embeddings are read.

    tokens   <image> <image> <image>  A  red  apple  .  <eos>
    labels      -       -       -     A  red  apple  .  <eos>      -> language modelling
    anchors  [------- mean -------]                                -> an embedding of the image
             [---------------------------------- last -----]      -> an embedding of everything so far

A *prepared image* is what the model's processor makes of an `ImageRef`: tensors, the number of tokens they take, and a key
that names the content. This module knows nothing of any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from vlduet.data.records import Part

IGNORE_INDEX = -100
"""The label of a token that carries no loss."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """What the processor made of one image."""

    inputs: Mapping[str, torch.Tensor]
    """The vision tower's inputs for this image alone, first dimension = its tiles or patches."""
    num_tokens: int
    """Tokens that the image takes in the sequence."""
    cache_key: str
    """Hash of the content and of the processor: equal keys give equal features."""
    grid: tuple[int, int] | None = None
    """Rows and columns of its tokens, for models that count positions in both directions."""
    interleaved_tokens: Mapping[int, int] = field(default_factory=dict)
    """Tokens among them that are words, such as the ends of its rows: place in the image -> id. Features fill the others."""

    @property
    def num_features(self) -> int:
        """Tokens that features fill."""
        return self.num_tokens - len(self.interleaved_tokens)

    @property
    def feature_span(self) -> tuple[int, int]:
        """Its tokens from the first feature to behind the last one, without the words that stand around them."""
        places = [place for place in range(self.num_tokens) if place not in self.interleaved_tokens]
        return places[0], places[-1] + 1

    def token_ids(self, image_token_id: int) -> list[int]:
        """What stands in the sequence."""
        return [
            self.interleaved_tokens.get(place, image_token_id) for place in range(self.num_tokens)
        ]


@dataclass(frozen=True, slots=True)
class Slice:
    """One image or text that an anchor stands for, and what frozen encoders see in it."""

    part: Part
    content_key: str
    """Names the content exactly."""
    features: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Role of an encoder -> float32[d], unit length; empty until encoders have looked at it."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where an embedding is read: the mean of the hidden states in [start, end). A last-token anchor has length one."""

    start: int
    end: int
    role: str
    """What the embedding stands for: image, text, query, positive, negative, ..."""
    record_name: str
    """Names the record it belongs to (`Sample.name`): pairs are made of anchors of one record."""
    content_key: str
    """Names the content: two anchors with one key are never each other's negatives."""
    slices: tuple[Slice, ...] = ()
    """What stands before the end of the anchor, for losses that compare contents; empty where none does."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One row of the forward pass, before padding."""

    token_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """labels[t] = ids[t] where token t is to be predicted from what stands before it, else IGNORE."""
    anchors: tuple[Anchor, ...] = ()
    images: tuple[tuple[int, PreparedImage], ...] = ()
    """(first token, image), in order; the image fills its num_tokens from there."""

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.labels)
        assert all(0 <= a.start < a.end <= len(self.token_ids) for a in self.anchors), (
            "an anchor outside its sequence"
        )
        assert not self.labels or self.labels[0] == IGNORE_INDEX, (
            "nothing stands before the first token"
        )

    def __len__(self) -> int:
        return len(self.token_ids)


def trim(sequence: Sequence, *, labels: bool, anchors: bool) -> Sequence | None:
    """The part of a sequence that decides what is asked of it; None where that is nothing.

    Attention is causal, so what stands behind the last label and the last anchor changes neither.

    Args:
        labels: its labels are wanted; anchors: its embeddings are.
    """
    wanted = sequence.labels if labels else (IGNORE_INDEX,) * len(sequence)
    kept = sequence.anchors if anchors else ()
    end = max((i + 1 for i, label in enumerate(wanted) if label != IGNORE_INDEX), default=0)
    end = max([end, *(anchor.end for anchor in kept)])
    if end == 0:
        return None
    # An image that is cut through would not fill its place; it stands whole or not at all.
    end = max([end, *(at + image.num_tokens for at, image in sequence.images if at < end)])
    images = tuple((at, image) for at, image in sequence.images if at < end)
    return Sequence(sequence.token_ids[:end], wanted[:end], kept, images)


def compute_position_ids(sequence: Sequence) -> torch.Tensor:
    """Position ids int64[1, T]: 0, 1, ...; int64[3, T] where images have a grid.

    The three are time, row and column (the multimodal rope of Qwen2-VL, arXiv 2409.12191). On a text they are equal and
    count on; an image is one moment, its tokens count rows and columns from there, and what follows goes on behind the
    larger of both.
    """
    if not any(image.grid for _, image in sequence.images):
        return torch.arange(len(sequence))[None]
    found = torch.empty(3, len(sequence), dtype=torch.long)
    done = now = 0
    for start, image in sequence.images:
        assert image.grid is not None and math.prod(image.grid) == image.num_tokens
        rows, columns = image.grid
        found[:, done:start] = now + torch.arange(start - done)
        now += start - done
        done = start + image.num_tokens
        found[0, start:done] = now
        found[1, start:done] = now + torch.arange(rows).repeat_interleave(columns)
        found[2, start:done] = now + torch.arange(columns).repeat(rows)
        now += max(rows, columns)
    found[:, done:] = now + torch.arange(len(sequence) - done)
    return found
