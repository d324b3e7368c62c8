"""Chunks of sequences: each sequence once, within the limit of tokens."""

from __future__ import annotations

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
