"""Sequences -> one batch: padded (one sequence a row) or packed (several a row, which cannot see each other)."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlduet.data.sequences import (
    IGNORE_INDEX,
    Anchor,
    PreparedImage,
    Sequence,
    compute_position_ids,
)

FORWARD_MAX_TOKENS = 4096
"""Tokens of one forward where nothing is trained."""
PACKED_ROW_TOKENS = 64
"""Tokens of a row that short sequences share where nobody asks otherwise: attention costs a CPU as much for each row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of T tokens. A row holds one sequence or several; `segments` tells them apart."""

    token_ids: Tensor
    """int64[B, T]"""
    labels: Tensor
    """int64[B, T], IGNORE where nothing is to be predicted."""
    segment_ids: Tensor
    """int64[B, T]: 0 on padding, else 1, 2, ... for the first, second, ... sequence of the row."""
    position_ids: Tensor
    """int64[B, T]: position ids, from 0 in every sequence; int64[3, B, T] where images have a grid."""
    image_mask: Tensor
    """bool[B, T]: tokens that image features fill, in row-major order."""
    images: tuple[PreparedImage, ...]
    """In the order of `image_mask`."""
    anchors: tuple[Anchor, ...]
    """In the order of the rows, and within a row of its sequences."""
    anchor_spans: Tensor
    """int64[A, 3]: row, start, end of every anchor in this batch."""
    shares_prefix: bool = False
    """The other sequences of a row go on from its first one, and see it (`data.branches`)."""

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    def attention_mask(self) -> Tensor | None:
        """What the trunk needs: None, int64[B, T] for right padding, or bool[B, 1, T, T] block-causal for the rest."""
        if bool((self.segment_ids == 1).all()):
            return None
        if int(self.segment_ids.max()) <= 1:
            return (self.segment_ids > 0).long()
        return self.block_causal_mask()

    def block_causal_mask(self, *, bidirectional_images: bool = False) -> Tensor:
        """bool[B, 1, T, T]: what a token sees, of its own sequence what stands before it.

        Args:
            mutual: the tokens of an image see each other, too.
        """
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        if self.shares_prefix:
            same |= self.segment_ids[:, None, :] == 1
        length = self.segment_ids.shape[1]
        order = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()[None]
        if bidirectional_images:  # images never touch: words stand around them
            begins = self.image_mask & ~F.pad(self.image_mask, (1, 0))[:, :-1]
            image = begins.cumsum(1) * self.image_mask  # 0 for words
            order = order | ((image[:, :, None] == image[:, None, :]) & self.image_mask[:, :, None])
        # A padding row would see nothing and softmax to NaN: every token sees at least itself.
        itself = torch.eye(length, dtype=torch.bool, device=same.device)
        return ((same & (self.segment_ids > 0)[:, :, None] & order) | itself)[:, None]

    def drop_anchors(self, anchors: Tensor) -> Batch:
        """The batch without the anchors that bool[A] marks, and without the rows in which nothing else is read."""
        if not anchors.any():
            return self
        left = ~anchors.to(self.token_ids.device)
        spans = self.anchor_spans[left]
        kept = (self.labels != IGNORE_INDEX).any(1)  # [B]
        kept[spans[:, 0]] = True
        starts = [0, *accumulate(image.num_features for image in self.images)][:-1]
        homes = kept[self.image_mask.nonzero()[starts, 0]].tolist()
        spans = torch.cat([(kept.cumsum(0) - 1)[spans[:, :1]], spans[:, 1:]], 1)
        return replace(
            self,
            **{
                name: getattr(self, name)[kept]
                for name in ("ids", "labels", "segments", "image_mask")
            },
            position_ids=self.position_ids[..., kept, :],
            images=tuple(image for image, stays in zip(self.images, homes, strict=True) if stays),
            anchors=tuple(
                anchor for anchor, stays in zip(self.anchors, left.tolist(), strict=True) if stays
            ),
            anchor_spans=spans,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; the images move when the vision tower reads them."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Batch(**moved)


def collate(
    sequences: list[Sequence],
    *,
    pad_id: int,
    padding_side: str = "right",
    pack_to: int | None = None,
) -> Batch:
    """Make a batch.

    Args:
        sequences: at least one. Anchors, images and labels come in the order of the rows: that of the sequences, unless
            they are packed, which may put a short one into an earlier row.
        pad_id: the token id of padding; its value never matters.
        side: right or left, where padding goes.
        pack_to: fill rows up to this many tokens with several sequences each, first fit in order.
    """
    rows = pack(sequences, pack_to) if pack_to else [[s] for s in sequences]
    return collate_rows(
        [[(s, compute_position_ids(s)) for s in row] for row in rows],
        pad_id=pad_id,
        padding_side=padding_side,
    )


def collate_rows(
    rows: list[list[tuple[Sequence, Tensor]]],
    *,
    pad_id: int,
    padding_side: str = "right",
    shares_prefix: bool = False,
) -> Batch:
    """A batch of these rows, each of sequences and their position ids."""
    width = max(sum(len(s) for s, _ in row) for row in rows)
    shape = (len(rows), width)
    ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE_INDEX)
    segments = torch.zeros(shape, dtype=torch.long)
    places = torch.zeros(
        max(len(found) for row in rows for _, found in row), *shape, dtype=torch.long
    )
    image_mask = torch.zeros(shape, dtype=torch.bool)
    images: list[PreparedImage] = []
    anchors: list[Anchor] = []
    spans: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        at = width - sum(len(s) for s, _ in row) if padding_side == "left" else 0
        for number, (sequence, found) in enumerate(row, 1):
            here = slice(at, at + len(sequence))
            ids[r, here] = torch.tensor(sequence.token_ids)
            labels[r, here] = torch.tensor(sequence.labels)
            segments[r, here] = number
            places[:, r, here] = found
            for start, image in sequence.images:
                image_mask[r, at + start : at + start + image.num_tokens] = True
                image_mask[r, [at + start + place for place in image.interleaved_tokens]] = False
                images.append(image)
            anchors += sequence.anchors
            spans += [(r, at + a.start, at + a.end) for a in sequence.anchors]
            at += len(sequence)
    spans_tensor = torch.tensor(spans, dtype=torch.long).reshape(-1, 3)
    where = places if len(places) > 1 else places[0]
    return Batch(
        ids,
        labels,
        segments,
        where,
        image_mask,
        tuple(images),
        tuple(anchors),
        spans_tensor,
        shares_prefix,
    )


def pack(sequences: list[Sequence], size: int) -> list[list[Sequence]]:
    """First fit, in order: rows of at most `size` tokens; a longer sequence gets a row of its own."""
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sequences:
        for r, left in enumerate(room):
            if len(sequence) <= left:
                rows[r].append(sequence)
                room[r] -= len(sequence)
                break
        else:
            rows.append([sequence])
            room.append(size - len(sequence))
    return rows


def split_into_chunks(
    sequences: list[Sequence], budget: int, *, pack_to: int | None = None
) -> Iterator[list[Sequence]]:
    """Groups that `collate` makes batches of at most `budget` padded tokens of (at least one row a group).

    A sequence is whole in its group, its images with it. Those without an anchor make groups of their own, behind the
    others: no embedding is read there (train/gradcache.py).
    """
    for anchored in (True, False):
        kind = [s for s in sequences if bool(s.anchors) == anchored]
        rows = pack(kind, pack_to) if pack_to else [[s] for s in kind]
        for group in group_by_length([sum(map(len, row)) for row in rows], budget):
            # In the order of the rows, `collate` packs them as they are: what did not fit an earlier row does not now.
            yield [sequence for i in sorted(group) for sequence in rows[i]]


def group_by_length(lengths: Many[int], budget: int) -> Iterator[list[int]]:
    """Indices in groups of like length whose padded size stays within `budget` tokens (at least one a group)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and (len(group) + 1) * lengths[i] > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
