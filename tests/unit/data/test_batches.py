"""Chunks hold each sequence once within the limit; packed sequences are as if they were alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlduet.data.batches import collate, split_into_chunks
from vlduet.data.sequences import IGNORE_INDEX, Anchor, PreparedImage, Sequence

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=12)
"""Length of a sequence, whether it has an anchor, and whether it has an image."""


def make_sequence(number: int, length: int, *, has_anchor: bool, has_image: bool) -> Sequence:
    anchor = Anchor(0, 1, "text", str(number), str(number))
    image = PreparedImage({}, 1, "key")
    return Sequence(
        (number,) * length,
        (IGNORE_INDEX,) * length,
        (anchor,) if has_anchor else (),
        ((0, image),) if has_image else (),
    )


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("pack_to", [None, 9])
def test_packed_sequences_have_positions_and_attention_of_their_own(
    padding_side: str, pack_to: int | None
) -> None:
    lengths = (4, 5, 3, 6, 2, 1)
    sequences = [
        make_sequence(i + 1, length, has_anchor=True, has_image=False)
        for i, length in enumerate(lengths)
    ]
    batch = collate(sequences, pad_token_id=0, padding_side=padding_side, pack_to=pack_to)
    assert len(batch.token_ids) == (6 if pack_to is None else 3)
    mask = batch.attention_mask()
    assert mask is not None and mask.dim() == (2 if pack_to is None else 4)
    allowed = batch.block_causal_mask()[:, 0]
    for number, length in enumerate(lengths, 1):
        rows, columns = (batch.token_ids == number).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) == 1 and len(columns) == length
        row = rows[0]
        assert batch.position_ids[row, columns].tolist() == list(range(length))
        expected = torch.zeros(length, allowed.shape[2], dtype=torch.bool)
        expected[:, columns] = torch.ones(length, length, dtype=torch.bool).tril()
        assert torch.equal(allowed[row, columns], expected)
        if mask.dim() == 4:
            assert torch.equal(mask[row, 0, columns], expected)


@settings(max_examples=30, deadline=None)
@example(shapes=[(n, False, False) for n in (1, 1, 8, 1, 2)], max_tokens=22, pack_to=12)
@given(shapes=SHAPES, max_tokens=st.integers(1, 120), pack_to=st.none() | st.integers(8, 60))
def test_chunks_hold_every_sequence_once_within_the_limit(
    shapes: list[tuple[int, bool, bool]], max_tokens: int, pack_to: int | None
) -> None:
    sequences = [
        make_sequence(i, length, has_anchor=has_anchor, has_image=has_image)
        for i, (length, has_anchor, has_image) in enumerate(shapes)
    ]
    chunks = list(split_into_chunks(sequences, max_tokens, pack_to=pack_to))
    chunked = [id(sequence) for chunk in chunks for sequence in chunk]
    assert sorted(chunked) == sorted(map(id, sequences))
    for chunk in chunks:
        batch = collate(chunk, pad_token_id=0, pack_to=pack_to)
        assert batch.token_ids.numel() <= max_tokens or len(batch.token_ids) == 1
        assert len({bool(sequence.anchors) for sequence in chunk}) == 1
        assert int(batch.image_mask.sum()) == len(batch.images)
