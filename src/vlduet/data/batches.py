"""Batches: sequences padded (one in each row) or packed (several, isolated by the mask)."""

from __future__ import annotations

from collections import abc
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
"""Number of padded tokens in one forward pass without gradients."""
PACKED_ROW_TOKENS = 64
"""Default length of a row of packed short sequences; on a CPU attention has a cost for each row."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of T tokens. A row holds one sequence, or several that `segment_ids` tell apart."""

    token_ids: Tensor
    """int64[B, T], token ids, the padding id after or before the sequences."""
    labels: Tensor
    """int64[B, T], the token id where a token must be predicted, else IGNORE_INDEX."""
    segment_ids: Tensor
    """int64[B, T]: 0 on padding, else 1, 2, ... for the first, second, ... sequence of the row."""
    position_ids: Tensor
    """int64[B, T], from 0 in every sequence; int64[3, B, T] where images have a grid."""
    image_mask: Tensor
    """bool[B, T], True at tokens that vision features fill, in row-major order."""
    images: tuple[PreparedImage, ...]
    """Images in the order of `image_mask`."""
    anchors: tuple[Anchor, ...]
    """A anchors in the order of the rows, and within a row of its sequences."""
    anchor_spans: Tensor
    """int64[A, 3]: row, start and end of every anchor in this batch."""
    shares_prefix: bool = False
    """True where the later sequences of a row continue its first one (`data.prefix_sharing`)."""

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that carry a language-modelling loss."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.segment_ids > 0).sum())

    def attention_mask(self) -> Tensor | None:
        """Return the cheapest mask that the language model needs for this batch.

        Returns:
            None if every row is one sequence without padding; int64[B, T] (1 on tokens, 0 on
            padding) for padded rows of one sequence; if any row holds several sequences,
            bool[B, 1, T, T], the causal `block_causal_mask`.
        """
        if bool((self.segment_ids == 1).all()):
            return None
        if int(self.segment_ids.max()) <= 1:
            return (self.segment_ids > 0).long()
        return self.block_causal_mask()

    def block_causal_mask(self, *, bidirectional_images: bool = False) -> Tensor:
        """Return bool[B, 1, T, T], True where the token in dimension 2 attends to that in 3.

        A token attends to itself and to the earlier tokens of its own sequence; with
        `shares_prefix` also to the row's first sequence. Padding attends to itself only.

        Args:
            bidirectional_images: let the neighbouring feature tokens of one image (a run of
                `image_mask`) attend to each other in both directions.
        """
        allowed = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]  # [B, T, T]
        if self.shares_prefix:
            allowed |= self.segment_ids[:, None, :] == 1
        length = self.segment_ids.shape[1]
        device = allowed.device
        order = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None]
        if bidirectional_images:
            # Images are numbered by their first tokens: ordinary tokens always separate two images.
            first_tokens = self.image_mask & ~F.pad(self.image_mask, (1, 0))[:, :-1]
            image_number = first_tokens.cumsum(1) * self.image_mask  # [B, T], 0 on text
            same_image = image_number[:, :, None] == image_number[:, None, :]
            order = order | (same_image & self.image_mask[:, :, None])
        allowed = allowed & (self.segment_ids > 0)[:, :, None] & order
        # A padding row would attend to nothing, and its softmax would be NaN.
        itself = torch.eye(length, dtype=torch.bool, device=device)
        return (allowed | itself)[:, None]

    def drop_anchors(self, is_dropped: Tensor) -> Batch:
        """Return a new batch without some anchors, and without the rows that then have no output.

        A row is removed, with its images, if it has neither a label nor a remaining anchor; B may
        become 0, T stays.

        Args:
            is_dropped: bool[A] on any device, True for the anchors to remove. If none is True,
                `self` is returned and no row is removed.
        """
        if not is_dropped.any():
            return self
        keep_anchor = ~is_dropped.to(self.token_ids.device)
        spans = self.anchor_spans[keep_anchor]
        keep_row = (self.labels != IGNORE_INDEX).any(1)  # [B]
        keep_row[spans[:, 0]] = True
        first_features = [0, *accumulate(image.num_features for image in self.images)][:-1]
        image_rows = self.image_mask.nonzero()[first_features, 0]
        keep_image = keep_row[image_rows].tolist()
        new_rows = keep_row.cumsum(0) - 1
        spans = torch.cat([new_rows[spans[:, :1]], spans[:, 1:]], 1)
        anchors = zip(self.anchors, keep_anchor.tolist(), strict=True)
        images = zip(self.images, keep_image, strict=True)
        return replace(
            self,
            token_ids=self.token_ids[keep_row],
            labels=self.labels[keep_row],
            segment_ids=self.segment_ids[keep_row],
            image_mask=self.image_mask[keep_row],
            position_ids=self.position_ids[..., keep_row, :],
            images=tuple(image for image, keep in images if keep),
            anchors=tuple(anchor for anchor, keep in anchors if keep),
            anchor_spans=spans,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`; images stay where they are."""
        values: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            values[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Batch(**values)


def collate(
    sequences: list[Sequence],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    pack_to: int | None = None,
) -> Batch:
    """Return one batch of all sequences, on the CPU.

    Args:
        sequences: at least one sequence (ValueError for none).
        pad_token_id: token id of padding; no result depends on it.
        padding_side: `right` or `left`.
        pack_to: None gives every sequence a row of its own. A number fills rows up to so many
            tokens by `pack`; labels, anchors and images then follow the order of the rows, not of
            `sequences`.
    """
    rows = pack(sequences, pack_to) if pack_to else [[sequence] for sequence in sequences]
    return collate_rows(
        [_with_position_ids(row) for row in rows],
        pad_token_id=pad_token_id,
        padding_side=padding_side,
    )


def _with_position_ids(row: list[Sequence]) -> list[tuple[Sequence, Tensor]]:
    """Return every sequence of a row with its position ids."""
    return [(sequence, compute_position_ids(sequence)) for sequence in row]


def collate_rows(
    rows: list[list[tuple[Sequence, Tensor]]],
    *,
    pad_token_id: int,
    padding_side: str = "right",
    shares_prefix: bool = False,
) -> Batch:
    """Return the batch of rows that are already formed, on the CPU.

    Row r of the batch is ``rows[r]``, its sequences one after the other without gaps. Position ids
    are int64[3, B, T] if any sequence has three rows of them (a single one is repeated), and 0 on
    padding.

    Args:
        rows: at least one row (ValueError for none); a row lists its sequences, each with its
            position ids, int64[1, length] or int64[3, length].
        pad_token_id: token id of padding.
        padding_side: `right` or `left`.
        shares_prefix: the later sequences of a row attend to its first one.
    """
    row_lengths = []
    for row in rows:
        row_lengths.append(sum(len(sequence) for sequence, _ in row))
    shape = (len(rows), max(row_lengths))
    token_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    segment_ids = torch.zeros(shape, dtype=torch.long)
    image_mask = torch.zeros(shape, dtype=torch.bool)
    num_axes = max(len(positions) for row in rows for _, positions in row)
    position_ids = torch.zeros(num_axes, *shape, dtype=torch.long)
    images: list[PreparedImage] = []
    anchors: list[Anchor] = []
    spans: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        offset = shape[1] - row_lengths[r] if padding_side == "left" else 0
        for number, (sequence, positions) in enumerate(row, 1):
            columns = slice(offset, offset + len(sequence))
            token_ids[r, columns] = torch.tensor(sequence.token_ids)
            labels[r, columns] = torch.tensor(sequence.labels)
            segment_ids[r, columns] = number
            position_ids[:, r, columns] = positions
            for start, image in sequence.images:
                first = offset + start
                image_mask[r, first : first + image.num_tokens] = True
                image_mask[r, [first + i for i in image.interleaved_tokens]] = False
                images.append(image)
            anchors += sequence.anchors
            spans += [(r, offset + a.start, offset + a.end) for a in sequence.anchors]
            offset += len(sequence)
    return Batch(
        token_ids=token_ids,
        labels=labels,
        segment_ids=segment_ids,
        position_ids=position_ids if num_axes > 1 else position_ids[0],
        image_mask=image_mask,
        images=tuple(images),
        anchors=tuple(anchors),
        anchor_spans=torch.tensor(spans, dtype=torch.long).reshape(-1, 3),
        shares_prefix=shares_prefix,
    )


def pack(sequences: list[Sequence], max_tokens: int) -> list[list[Sequence]]:
    """Return rows of at most `max_tokens` tokens; a sequence joins the first that has room.

    A sequence that is longer than `max_tokens` gets a row of its own. No sequence is cut. Rows are
    in the order in which they were opened; [] for no sequences.
    """
    rows: list[list[Sequence]] = []
    free_tokens: list[int] = []
    for sequence in sequences:
        for r, free in enumerate(free_tokens):
            if len(sequence) <= free:
                rows[r].append(sequence)
                free_tokens[r] -= len(sequence)
                break
        else:
            rows.append([sequence])
            free_tokens.append(max_tokens - len(sequence))
    return rows


def split_into_chunks(
    sequences: list[Sequence], max_tokens: int, *, pack_to: int | None = None
) -> abc.Iterator[list[Sequence]]:
    """Yield groups of sequences that `collate` turns into batches of at most `max_tokens` tokens.

    Padding counts. A group has at least one row, which may be longer than `max_tokens`. Sequences
    without anchors form groups of their own, after all others: GradCache skips their first pass
    (`train/gradcache.py`). Both go from short to long rows.

    Args:
        sequences: the sequences to divide; each is in exactly one group. None yield nothing.
        max_tokens: bound on rows x row length of a group.
        pack_to: value that `collate` will get.
    """
    for has_anchors in (True, False):
        subset = [s for s in sequences if bool(s.anchors) == has_anchors]
        rows = pack(subset, pack_to) if pack_to else [[s] for s in subset]
        row_lengths = [sum(map(len, row)) for row in rows]
        for group in group_by_length(row_lengths, max_tokens):
            # In this order `collate` forms the same rows again: a sequence that did not fit into an
            # earlier row when all rows were formed does not fit into it now.
            yield [sequence for i in sorted(group) for sequence in rows[i]]


def group_by_length(lengths: abc.Sequence[int], max_tokens: int) -> abc.Iterator[list[int]]:
    """Yield groups of indices of similar lengths whose padded size is at most `max_tokens`.

    The padded size is the number of indices times the largest length. Lengths ascend within and
    across groups. An index whose length exceeds `max_tokens` is a group of its own. No lengths
    yield nothing.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
