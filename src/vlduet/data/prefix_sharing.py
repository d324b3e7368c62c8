"""Sequences that begin alike, such as the options of a question: what they begin with is laid out, and read, once.

    <image> What is this?  A cat.        trunk     <image> What is this?
    <image> What is this?  A dog.   ->   branches  A cat.  A dog.             each sees the trunk and itself

Attention is causal: no token of the trunk depends on what follows, and a branch reads what it would have read alone. It
begins at least one token before its first label, so the state that predicts the label is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, zip_longest

from vlduet.data.batches import Batch, collate_rows, group_by_length
from vlduet.data.sequences import IGNORE_INDEX, Sequence, compute_position_ids


@dataclass(frozen=True, slots=True)
class SharedPrefixRow:
    """Neighbours that share a trunk; one sequence alone is all trunk."""

    sequences: tuple[Sequence, ...]
    prefix_length: int
    """Tokens that all of them begin with."""

    def __len__(self) -> int:
        return self.prefix_length + sum(
            len(sequence) - self.prefix_length for sequence in self.sequences
        )

    def with_sequence(self, sequence: Sequence) -> SharedPrefixRow:
        """The row with one more."""
        return SharedPrefixRow(
            (*self.sequences, sequence),
            min(self.prefix_length, shared_prefix_length(self.sequences[0], sequence)),
        )


def build_rows(sequences: list[Sequence], budget: int) -> list[SharedPrefixRow]:
    """Neighbours share a row of at most `budget` tokens where the trunk is at least half of each; the order stays."""
    found: list[SharedPrefixRow] = []
    for sequence in sequences:
        row = found[-1].with_sequence(sequence) if found else None
        if (
            row is not None
            and len(row) <= budget
            and 2 * row.prefix_length >= max(map(len, row.sequences))
        ):
            found[-1] = row
        else:
            found.append(SharedPrefixRow((sequence,), len(sequence)))
    return found


def group_rows(
    sequences: list[Sequence], budget: int
) -> Iterator[tuple[list[int], list[SharedPrefixRow]]]:
    """Groups of rows whose padded size stays within `budget` tokens (at least one a group), with their sequences."""
    every = build_rows(sequences, budget)
    ends = [0, *accumulate(len(row.sequences) for row in every)]
    for group in group_by_length([len(row) for row in every], budget):
        yield [i for n in group for i in range(ends[n], ends[n + 1])], [every[n] for n in group]


def shared_prefix_length(one: Sequence, other: Sequence) -> int:
    """Tokens that two have in common, images whole, up to the token that predicts the first label of either."""
    end = (
        min(
            next((t for t, label in enumerate(s.labels) if label != IGNORE_INDEX), len(s))
            for s in (one, other)
        )
        - 1
    )
    end = next((t for t in range(end) if one.token_ids[t] != other.token_ids[t]), end)
    for mine, theirs in zip_longest(one.images, other.images):
        start = min(found[0] for found in (mine, theirs) if found)
        same = mine and theirs and (mine[0], mine[1].cache_key) == (theirs[0], theirs[1].cache_key)
        if start < end and not (same and start + mine[1].num_tokens <= end):
            return int(start)
    return max(end, 0)


def collate_shared_prefixes(found: list[SharedPrefixRow], *, pad_id: int) -> Batch:
    """A batch with one row each. It is read for its labels: anchors are left out."""
    laid = []
    for row in found:
        parts = [(row.sequences[0], 0, row.prefix_length)] if row.prefix_length else []
        parts += [
            (sequence, row.prefix_length, len(sequence))
            for sequence in row.sequences
            if len(sequence) > row.prefix_length
        ]
        laid.append(
            [
                (_cut(s, begin, end), compute_position_ids(s)[:, begin:end])
                for s, begin, end in parts
            ]
        )
    return collate_rows(laid, pad_id=pad_id, shares_prefix=True)


def _cut(sequence: Sequence, begin: int, end: int) -> Sequence:
    images = tuple((at - begin, image) for at, image in sequence.images if begin <= at < end)
    return Sequence(sequence.token_ids[begin:end], sequence.labels[begin:end], images=images)
