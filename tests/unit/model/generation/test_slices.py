"""The ends of sentences that are found token by token are those of the whole text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlduet.data.records import find_sentences
from vlduet.model.generation.slices import SliceReader

PIECES = [
    "A dog",
    " runs",
    ".",
    " ",
    "Then",
    " it",
    "!",
    '"',
    ")",
    "\n\n",
    "3",
    ".5",
    "。",
    "是",
    "(",
]


def read_slices(pieces, *, has_end=True):
    """Return (index of the token where a state was read, whether it is the last) of each slice."""
    reader = SliceReader()
    slice_ends = []
    for number, piece in enumerate([*pieces, ""]):
        # The state of a token is its number: the one before the next token, from 0 on.
        state = torch.tensor([number - 1])
        is_end = number == len(pieces)
        if is_end and not has_end:
            break
        slice_end = reader.find_end(state, piece, is_end=is_end)
        if slice_end is not None:
            slice_ends.append((int(slice_end.state), slice_end.is_last))
        reader.add_text(piece)
    return slice_ends


def find_token(pieces, end):
    """Return the index of the token that covers the character before `end`."""
    length = 0
    for number, piece in enumerate(pieces):
        length += len(piece)
        if length >= end:
            return number
    raise AssertionError("the text is shorter")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["A", " dog", ".", " Then", " it"], [(2, False), (4, True)]),
        (["A dog", ".", " ", "Then"], [(1, False), (3, True)]),  # not at the blank
        (["A dog", ".\n\n", "Then"], [(1, False), (2, True)]),
        (["It has 3", ".", "5 legs", "."], [(3, True)]),
        (["e.g.", " this", "."], [(2, True)]),
        (['"No."', " He", " left"], [(0, False), (2, True)]),
        (["一只狗。", "它跑。"], [(0, False), (1, True)]),
        (["A dog.", " (", "Then"], [(0, False), (2, True)]),
        (["a name"], [(0, True)]),
        ([" ", "\n"], []),
    ],
)
def test_the_state_at_the_last_character_of_every_sentence_is_read(pieces, expected):
    assert read_slices(pieces) == expected


def test_a_text_that_does_not_end_has_no_slice_for_its_last_sentence():
    assert read_slices(["A dog", ".", " Then", "."], has_end=False) == [(1, False)]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12))
def test_slices_are_those_of_the_whole_text(pieces):
    text = "".join(pieces)
    slice_ends = read_slices(pieces)
    ends = [find_token(pieces, end) for _, end in find_sentences(text)]
    assert [token for token, _ in slice_ends] == ends
    assert [is_last for _, is_last in slice_ends] == [False] * (len(ends) - 1) + [True] * bool(ends)


def test_a_slice_begins_anew_after_an_image():
    reader = SliceReader()
    reader.find_end(torch.zeros(1), "A dog", is_end=False)
    reader.add_text("A dog")
    reader.restart()
    assert reader.find_end(torch.ones(1), "Then", is_end=False) is None
    reader.add_text("Then")
    slice_end = reader.find_end(torch.full((1,), 2.0), "", is_end=True)
    assert slice_end is not None
    assert slice_end.state.item() == 2
