"""Prefix sharing: sequences with a common beginning, such as options of a question, read it once.

    <image> What is this?  A cat.       prefix         <image> What is this?
    <image> What is this?  A dog.  ->   continuations  A cat.  A dog.

Each continuation attends to the prefix and to itself. Attention is causal, so no token of the
prefix depends on a continuation, and a continuation gets the hidden states that it would have
alone. It begins at least one token before its first label, so that the state that predicts the
label is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from vlduet.data.batches import Batch, collate_rows, group_by_length
from vlduet.data.sequences import IGNORE_INDEX, Sequence, compute_position_ids


@dataclass(frozen=True, slots=True)
class SharedPrefixRow:
    """Consecutive sequences that share a prefix; a single sequence is all prefix."""

    sequences: tuple[Sequence, ...]
    """At least one sequence, each with its prefix."""
    prefix_length: int
    """Number of leading tokens that all sequences share."""

    def __len__(self) -> int:
        """Return the number of tokens of the row: the prefix once, then every continuation."""
        return self.prefix_length + sum(len(s) - self.prefix_length for s in self.sequences)

    def with_sequence(self, sequence: Sequence) -> SharedPrefixRow:
        """Return a new row with one more sequence, its prefix shortened to what all share."""
        prefix_length = min(self.prefix_length, shared_prefix_length(self.sequences[0], sequence))
        return SharedPrefixRow((*self.sequences, sequence), prefix_length)


def build_rows(sequences: list[Sequence], max_tokens: int) -> list[SharedPrefixRow]:
    """Return rows that hold all sequences in their order; [] for none.

    A sequence joins the row of its predecessor if the row then has at most `max_tokens` tokens and
    its prefix is at least half of each of its sequences; otherwise it opens a row, even if it
    alone is longer than `max_tokens`.
    """
    rows: list[SharedPrefixRow] = []
    for sequence in sequences:
        row = rows[-1].with_sequence(sequence) if rows else None
        if (
            row is not None
            and len(row) <= max_tokens
            and 2 * row.prefix_length >= max(map(len, row.sequences))
        ):
            rows[-1] = row
        else:
            rows.append(SharedPrefixRow((sequence,), len(sequence)))
    return rows


def group_rows(
    sequences: list[Sequence], max_tokens: int
) -> Iterator[tuple[list[int], list[SharedPrefixRow]]]:
    """Yield groups of rows for `collate_shared_prefixes`, of similar lengths, short ones first.

    Yields:
        (indices into `sequences` in the order of the rows, the rows). The padded size of a group
        is at most `max_tokens`, unless one sequence alone is longer. No sequences yield nothing.
    """
    rows = build_rows(sequences, max_tokens)
    first_index = [0, *accumulate(len(row.sequences) for row in rows)]
    for group in group_by_length([len(row) for row in rows], max_tokens):
        indices = [i for r in group for i in range(first_index[r], first_index[r + 1])]
        yield indices, [rows[r] for r in group]


def shared_prefix_length(first: Sequence, second: Sequence) -> int:
    """Return how many leading tokens two sequences can share.

    The prefix ends before the first token that differs, before the token that predicts the first
    label of either sequence (the last token if it has no label), and before the first image that
    is not the same, at the same index, in the other, or not completely inside. It may be 0.
    """
    end = min(_first_label(first), _first_label(second)) - 1
    end = next((t for t in range(end) if first.token_ids[t] != second.token_ids[t]), end)
    second_images = dict(second.images)
    for start, image in first.images:
        other = second_images.pop(start, None)
        is_shared = (
            other is not None
            and other.cache_key == image.cache_key
            and start + image.num_tokens <= end
        )
        if not is_shared:
            end = min(end, start)
    return max(0, min([end, *second_images]))


def _first_label(sequence: Sequence) -> int:
    """Return the index of the first label, or the sequence's length if it has none."""
    labelled = (t for t, label in enumerate(sequence.labels) if label != IGNORE_INDEX)
    return next(labelled, len(sequence))


def collate_shared_prefixes(rows: list[SharedPrefixRow], *, pad_token_id: int) -> Batch:
    """Return the batch of rows, at least one, for likelihoods; on the CPU, padded on the right.

    Segment 1 of row r is the prefix of ``rows[r]``, the later ones are its continuations, with the
    position ids of their whole sequences. Labels and images are kept, anchors dropped.
    """
    segments_of_rows = []
    for row in rows:
        prefix = row.prefix_length
        spans = [(row.sequences[0], 0, prefix)] if prefix else []
        spans += [(s, prefix, len(s)) for s in row.sequences if len(s) > prefix]
        segments_of_rows.append(
            [
                (_slice_sequence(s, start, end), compute_position_ids(s)[:, start:end])
                for s, start, end in spans
            ]
        )
    return collate_rows(segments_of_rows, pad_token_id=pad_token_id, shares_prefix=True)


def _slice_sequence(sequence: Sequence, start: int, end: int) -> Sequence:
    """Return tokens, labels and images of [start, end), without anchors."""
    images = tuple((at - start, image) for at, image in sequence.images if start <= at < end)
    return Sequence(sequence.token_ids[start:end], sequence.labels[start:end], images=images)
